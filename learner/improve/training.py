"""The loop of every improver: push, sample, score, update; it saves candidates and a state to resume from.

A step involves three policies: mu, the engine that sampled; pi_old, the trainer before its update; pi_theta, the
trainer during its update. Every step checks that the weights pushed are the weights sampled from. A step's draws depend
only on the seed and its number, so a killed loop resumes from its last state (`learner.improve.state`) as if it had not
been killed.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from learner.improve.adam import Adam
from learner.improve.base import Task
from learner.improve.budget import Budget
from learner.improve.candidates import candidate, candidates, drop_candidates
from learner.improve.policy_gradient import adapt_kl_coef, draw_minibatches
from learner.improve.state import load_state, save_state
from learner.improve_settings import PolicyGradientSettings, PolicySettings, TrainingSettings
from learner.model.forward import Tokens, answer_logprobs, shares_prefix
from learner.model.kl import kl_k1
from learner.model.mismatch import PUSH_ANSWERS, Mismatch, check_push, mismatch
from learner.model.passes import ReferencePass, policy_logprobs, reference_pass
from learner.model.rollout import Rollout, draw_generator
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import EndedBy, Improvement, StepMetrics

# Mean |log pi_theta / pi_old| in nats, before the first update, above which the two are not the same policy.
MAX_FIRST_RATIO_ERROR = 0.05

# Features of every prefix, (b, t, P), from the states of the response (b, t, F) and of the prompt's last token (b, F).
PrefixFeatures = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SampledBatch:
    """A rollout batch before its update. old_logprobs (B, T) are pi_old's; `kl` is the mean sequence KL to the
    reference in nats."""

    rollout: Rollout
    passes: list[list[Tensor]]
    judged: ReferencePass
    old_logprobs: Tensor
    gap: Mismatch
    kl: float

    @property
    def length(self) -> float:
        """The mean length of its answers, in tokens."""
        return float(self.rollout.tokens.response_mask.sum(dim=1).float().mean())


# Makes the update of a step on its batch, given the metrics of the steps before it; returns the step's own.
Update = Callable[[SampledBatch, list[StepMetrics]], StepMetrics]


@dataclass(frozen=True)
class Training:
    """A task, and the settings of the loop. It ends when `settings.steps` are done, the sequence KL exceeds its budget
    or the score's uncertainty outgrows its gain."""

    task: Task
    settings: TrainingSettings
    policy_settings: PolicySettings
    # Passes of an update over its batch, and minibatches in each.
    epochs: int = 1
    minibatches: int = 1
    prefix: PrefixFeatures | None = None

    def run(
        self, optimizer: Adam, batches: Iterator[list[Prompt]], update: Update, kl_target: float | None = None
    ) -> Improvement:
        """Trains until the end; resumes after the last saved state. `batches` are the prompts of each step."""
        directory, budget, workers = self.task.directory, self.task.budget, self.task.policy.group
        steps = [StepMetrics(**step) for step in load_state(directory, optimizer)]
        self._drop_candidates(after=len(steps))
        for step in steps:
            self.task.on_step(step)

        ended_by: EndedBy = "steps"
        for number, prompts in enumerate(islice(batches, len(steps), self.settings.steps), start=len(steps)):
            if outgrown(steps, self.settings.patience):
                ended_by = "uncertainty"
                break
            batch = self._sample(prompts, number)
            if batch.kl > budget.of(batch.length):
                # The weights that were just sampled from exceed the budget: they are no candidate.
                self._drop_candidates(after=number - 1)
                ended_by = "kl_budget"
                break
            steps.append(workers.leaders(update(batch, steps)))
            self._keep(optimizer, steps)
            self.task.on_step(steps[-1])
        share = budget.share(steps[-1].length) if steps else 1.0
        return Improvement(steps, candidates(directory), ended_by, kl_target and kl_target * share, budget.kl * share)

    def logprobs_of(self, tokens: Tokens) -> Tensor:
        """(B, T) log-probabilities of pi_theta, with their gradients."""
        return self.task.policy.run(partial(answer_logprobs, tokens=tokens, temperature=self.task.source.temperature))

    @property
    def sharing(self) -> bool:
        """Whether the policy's passes share a prefix (`micro_batches`)."""
        return shares_prefix(self.task.policy.model)

    def _sample(self, prompts: list[Prompt], number: int) -> SampledBatch:
        """Samples answers of the current policy and passes them through the reference and the trainer. Raises
        RuntimeError if the engine cannot have had these weights."""
        policy, source, spec = self.task.policy, self.task.source, self.task.reward_model.spec
        temperature, budget = source.temperature, self.policy_settings.micro_batch_tokens
        rollout = source.rollout(policy, prompts, number + 1)
        tokens, exact = rollout.tokens, policy.model.dtype == torch.float32
        # Every pass over the rollout is split into the micro-batches of the update's first pass: in bfloat16 a row's
        # log-probabilities depend on the other rows of its micro-batch, and pi_theta must start as pi_old.
        passes = draw_minibatches(tokens, self.epochs, self.minibatches, draw_generator(source.seed, number))
        judged = reference_pass(policy, tokens, spec, temperature, budget, passes[0], self.prefix)
        # In float32 the engine and the trainer differ too little to matter: pi_old is mu, and a pass over some answers
        # of each engine is enough to check the push.
        order, shares = torch.arange(len(tokens), device=policy.model.device), policy.group.shares(len(tokens))
        by_engine = [order[own.start : own.stop][: PUSH_ANSWERS if exact else None] for own in shares]
        rows = torch.cat(by_engine)
        seen = policy_logprobs(policy, tokens, temperature, budget, [rows] if exact else passes[0])

        def gap(rows: Tensor) -> Mismatch:
            return mismatch(seen[rows], rollout.behavior_logprobs[rows], tokens.response_mask[rows])

        for each in by_engine:
            check_push(gap(each), self.policy_settings.mismatch_limit, policy.model.dtype)
        if number == 0 and self.policy_settings.start_from == "reference":
            check_start(seen[rows], judged.ref_logprobs[rows])
        old_logprobs = rollout.behavior_logprobs if exact else seen
        kl = float(kl_k1(old_logprobs, judged.ref_logprobs).sum(dim=1).mean())
        return SampledBatch(rollout, passes, judged, old_logprobs, gap(rows), policy.group.leaders(kl))

    def _keep(self, optimizer: Adam, steps: list[StepMetrics]) -> None:
        """Saves the candidate and the state after these steps, if they are due."""
        settings, done = self.settings, len(steps)
        if done % settings.save_every == 0 or done == settings.steps:
            self.task.policy.save(candidate(self.task.directory, done))
        if done % settings.checkpoint_every == 0:
            save_state(self.task.directory, [asdict(step) for step in steps], optimizer)

    def _drop_candidates(self, after: int) -> None:
        """Deletes the candidates of steps later than `after`."""
        if self.task.policy.group.leads:
            drop_candidates(self.task.directory, after)


def next_kl_coef(steps: list[StepMetrics], settings: PolicyGradientSettings, kl_target: float, budget: Budget) -> float:
    """The penalty's weight after the steps so far. Short answers are to reach as much less as their budget is."""
    if not steps:
        return settings.kl_coef
    last = steps[-1]
    target = kl_target * budget.share(last.length)
    return adapt_kl_coef(last.kl_coef, last.kl, target, settings.kl_horizon, settings.episodes)


def outgrown(steps: list[StepMetrics], patience: int) -> bool:
    """Whether score minus uncertainty was best more than `patience` steps ago: since then the disagreement between the
    members of the reward model has grown by more than the score."""
    sure = [step.score - step.uncertainty for step in steps]
    return len(sure) - sure.index(max(sure)) > patience + 1 if sure else False


def replace_cut(scores: Tensor, rollout: Rollout, missing_eos_score: float | None) -> Tensor:
    """Scores (B,), with a replacement for answers that the length limit cut, if one is set."""
    return scores if missing_eos_score is None else torch.where(rollout.ended, scores, missing_eos_score)


def check_start(old_logprobs: Tensor, ref_logprobs: Tensor) -> None:
    """Raises RuntimeError if the policy, which starts from the reference, differs from it."""
    difference = float((old_logprobs - ref_logprobs).abs().max())
    if difference > 1e-3:
        raise RuntimeError(f"The policy differs from its reference by {difference:.4f} nats before its first update.")


def check_first_ratio(error: float) -> None:
    """Raises RuntimeError if pi_theta differed from pi_old by `error` nats per token before the first step."""
    if error > MAX_FIRST_RATIO_ERROR:
        raise RuntimeError(f"pi_theta differed from pi_old by {error:.3f} nats per token before its update.")

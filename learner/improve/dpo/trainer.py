"""DPO: the votes themselves train the policy; its rollouts only measure how far it went."""

from dataclasses import replace
from functools import partial
from itertools import islice
from statistics import mean

import torch
from torch import Tensor, nn

from learner.improve.adam import Adam
from learner.improve.base import Task, endless
from learner.improve.dpo.votes import WeighedVotes, batches, implicit_rewards, penalty, trained
from learner.improve.state import start_over_unless
from learner.improve.step_metrics import step_metrics
from learner.improve.training import SampledBatch, Training
from learner.improve_settings import DPOSettings, PolicySettings
from learner.model.features import TokenPair
from learner.model.forward import answer_logprobs, to_tokens
from learner.model.policy import TrainablePolicy
from learner.reward.linear_heads import Heads, start
from server.store.learning.round_metrics import Improvement, StepMetrics

# Adam's learning rate for the width of a tie, the bars and the effect of temperature.
BARS_LEARNING_RATE = 0.02


class DPO:
    """An `Improver`: direct preference optimisation (Rafailov et al. 2023) on every kind of vote, with the likelihood
    of the reward model. The reward model only says when to stop and which candidates are promising."""

    def __init__(self, settings: DPOSettings, policy_settings: PolicySettings, votes: WeighedVotes) -> None:
        self._settings = settings
        self._policy_settings = policy_settings
        self._votes = votes

    def improve(self, task: Task) -> Improvement:
        """See `Improver.improve`."""
        settings, budget_of_a_pass = self._settings, self._policy_settings.micro_batch_tokens
        heads = trained(start(1, 0, self._votes.votes.users, torch.zeros(1)))
        bars = [value for value in vars(heads).values() if isinstance(value, nn.Parameter)]
        rates = (task.policy.parameters, settings.learning_rate), (bars, BARS_LEARNING_RATE)
        optimizer = Adam(list(rates), settings.adam_epsilon, task.policy.group)
        training = Training(task, settings, self._policy_settings)
        if task.policy.group.leads:
            start_over_unless(self._votes.digest, task.directory)
        task.policy.group.wait()
        read = reference_logprobs(task.policy, self._votes.answers, task.source.temperature, budget_of_a_pass)
        votes = replace(self._votes, ref_logprobs=read)
        drawn = list(islice(endless(len(votes), settings.votes, task.source.seed), settings.steps))

        def update(batch: SampledBatch, steps: list[StepMetrics]) -> StepMetrics:
            numbers = torch.tensor(drawn[len(steps)])
            optimizer.set_learning_rate(0, settings.at_length(batch.length).learning_rate)
            minibatches = [votes[some.sort().values] for some in numbers.tensor_split(settings.minibatches)]
            made = [self._step(training, optimizer, heads, minibatch) for minibatch in minibatches]
            return step_metrics(
                batch,
                task.reward_model,
                step=len(steps),
                kl_coef=settings.beta,
                policy_loss=mean(loss for loss, _ in made),
                grad_norm=mean(norm for _, norm in made),
                optimizer_steps=len(made),
            )

        return training.run(optimizer, task.source.batches(settings.episodes), update)

    def _step(self, training: Training, optimizer: Adam, heads: Heads, votes: WeighedVotes) -> tuple[float, float]:
        """One optimiser step on these votes; returns their mean loss and the gradient's norm."""
        settings, total = self._settings, 0.0
        # The weight of as many votes on average, so that a minibatch of votes that count little makes a small step.
        weight = self._votes.weight * len(votes) / len(self._votes)
        parts = batches(votes.sizes, self._policy_settings.micro_batch_tokens)
        for numbers, counts in optimizer.workers.turns(parts):
            part = votes[numbers]
            tokens = to_tokens(*map(list, zip(*part.answers, strict=True))).to(training.task.policy.model.device)
            logprobs = training.logprobs_of(tokens).sum(dim=1).cpu()
            share = self._votes.lengths.float().mean() / part.lengths if settings.length_normalised else 1.0
            rewards = implicit_rewards(logprobs, part.ref_logprobs, settings.beta, share)
            loss = part.loss(heads, rewards, weight) * counts
            loss.backward()
            optimizer.gather()
            total += float(loss.detach())
        if optimizer.workers.leads:
            penalty(heads, self._votes.weight).backward()
        return sum(optimizer.workers.gather([total])), optimizer.step(settings.max_grad_norm)


@torch.no_grad()
def reference_logprobs(policy: TrainablePolicy, answers: list[TokenPair], temperature: float, budget: int) -> Tensor:
    """(N,) log pi_ref of whole answers, in passes of at most `budget` tokens."""
    logprobs = torch.zeros(len(answers))
    lengths = torch.tensor([[1, len(prompt) + len(answer)] for prompt, answer in answers])
    for rows, counts in policy.group.turns(batches(lengths, budget)):
        tokens = to_tokens(*map(list, zip(*(answers[row] for row in rows.tolist()), strict=True)))
        tokens = tokens.to(policy.model.device)
        found = policy.run_reference(partial(answer_logprobs, tokens=tokens, temperature=temperature))
        if counts:
            logprobs[rows] = found.sum(dim=1).cpu()
    policy.group.add(logprobs)
    return logprobs

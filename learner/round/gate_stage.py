"""The gate stage: candidates, incumbent and reference answer the held-out prompts, and a judge fitted on judge votes
compares them.
"""

import json
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from learner.gate.answer_health import health
from learner.gate.rules import Verdict, decide
from learner.gate.win_rate import Judge, Look, fit_judge, length_matched, looks, win_rate, wins
from learner.improve.candidates import candidate
from learner.model.kl import kl_k1
from learner.model.mismatch import PUSH_ANSWERS, check_push, mismatch
from learner.model.passes import policy_logprobs, reference_pass
from learner.model.rollout import SampledAnswer, draw_seed, to_rollout
from learner.reward.base import RewardModel
from learner.reward.dataset import Dataset
from learner.round.canary import why_no_canary
from learner.round.workspace import Workspace, spread
from learner.settings import GateSettings
from server.shared.whole_file import whole_file
from server.store.chats.records import Prompt
from server.store.files.residue import ANSWERS, keeping, sweep
from server.store.learning.round_metrics import (
    CandidateMetrics,
    GateMetrics,
    Improvement,
    RoundMetrics,
)

# Number of the random draw that all versions answer with; a second look uses the one before it. Training uses neither.
GATE_DRAW = 999


@dataclass(frozen=True)
class Answers:
    """One version's answers, M to each of N prompts, grouped by prompt: features (N * M, F), and for a candidate kl (N
    * M,), nats to the reference; both on the CPU, where the judge is."""

    samples: list[SampledAnswer]
    features: Tensor
    kl: Tensor

    def __add__(self, more: "Answers") -> "Answers":
        features, kl = torch.cat([self.features, more.features]), torch.cat([self.kl, more.kl])
        return Answers(self.samples + more.samples, features, kl)


def judge_candidates(
    work: Workspace,
    dataset: Dataset,
    features: Tensor,
    reward_model: RewardModel,
    improvement: Improvement,
) -> Verdict:
    """Decides which candidate is promoted, if any, and stores every judged answer.

    A first look at half of the prompts ends the gate if the case is already clear (`learner.gate.win_rate.looks`)."""
    if work.done("gate") and (stored := work.round.metrics.gate):
        return Verdict(stored.chosen, stored.reasons, stored.canary)
    no_canary = why_no_canary(work.store, work.settings)
    gate, prompts = work.settings.gate, spread(work.prompts.held_out, work.settings.gate.prompts)
    judge = _judge(work, dataset, features, reward_model)
    steps = promising(improvement, gate)
    incumbent, reference = work.round.incumbent_version, work.round.reference_version
    planned = looks(len(prompts), gate)
    # In the first round incumbent and reference are the same version, which answers only once.
    versions = list(dict.fromkeys([reference, incumbent]))
    answers: dict[str, Answers] = {}
    measured: dict[int, CandidateMetrics] = {}
    asked = 0
    total = (len(versions) + len(steps)) * len(planned)
    with work.stages.stage("gate", "judging candidates", total) as advance:
        for draw, look in enumerate(planned):
            asking = [prompt for prompt in prompts[asked : look.prompts] for _ in range(gate.answers)]
            seed, asked = draw_seed(work.settings.seed, GATE_DRAW - draw), look.prompts
            for version in versions:
                _add(answers, version, _published_answers(work, version, asking, seed, reward_model))
                advance(1)
            for step in steps:
                _add(answers, f"step {step}", _candidate_answers(work, step, asking, seed, reward_model))
                opponents = answers[incumbent], answers[reference]
                measured[step] = _figures(work, step, answers[f"step {step}"], *opponents, judge, reward_model, look)
                advance(1)
            baseline = health(answers[incumbent].samples)
            kept = [measured[step] for step in steps]
            verdict = decide(kept, baseline, work.settings.policy.kl_budget, gate, canary=not no_canary)
            hopeful = [step for step in steps if not measured[step].hopeless]
            # At half of the prompts, what people are to decide may still become clear.
            if (verdict.promoted and not verdict.canary) or not hopeful:
                break
            steps = hopeful
    figures = GateMetrics(verdict.chosen, verdict.reasons, list(measured.values()), baseline, verdict.canary, no_canary)
    _record(work, prompts[:asked], answers, figures)
    return verdict


def _record(work: Workspace, prompts: list[Prompt], answers: dict[str, Answers], figures: GateMetrics) -> None:
    """Writes every answer to a file, and the metrics to TensorBoard and the store, which marks the stage as done."""
    incumbent, reference = work.round.incumbent_version, work.round.reference_version
    roles = {"reference": answers.pop(reference)}
    roles["incumbent"] = answers.pop(incumbent) if incumbent != reference else roles["reference"]
    _keep_answers(work, prompts, {name: each.samples for name, each in (roles | answers).items()})
    _log_gate(work, figures.chosen)
    work.record("gate", RoundMetrics(gate=figures))


def _judge(work: Workspace, dataset: Dataset, features: Tensor, reward_model: RewardModel) -> Judge:
    return fit_judge(
        features,
        dataset.judge,
        reward_model.standardiser,
        reward_model.l2,
        work.settings.reward.label_smoothing,
        work.settings.gate.refits,
        work.generator(3),
    )


def _add(answers: dict[str, Answers], name: str, more: Answers) -> None:
    answers[name] = answers[name] + more if name in answers else more


def _published_answers(
    work: Workspace, version: str, prompts: list[Prompt], seed: int, reward_model: RewardModel
) -> Answers:
    work.push(version)
    samples = work.engine.sample(prompts, seed)
    return Answers(samples, work.features_of(samples, reward_model), torch.zeros(0))


def _candidate_answers(
    work: Workspace, step: int, prompts: list[Prompt], seed: int, reward_model: RewardModel
) -> Answers:
    settings, temperature = work.settings.policy, work.settings.service_temperature
    work.policy.load(candidate(work.directory, step))
    work.engine.push(work.policy.engine_weights())
    rollout = to_rollout(work.engine.sample(prompts, seed)).to(work.policy.model.device)
    budget = settings.micro_batch_tokens
    judged = reference_pass(work.policy, rollout.tokens, reward_model.layers, temperature, budget)
    # The trainer's log-probabilities, not the engine's: rounding adds to each token's, and so to a long answer's KL. In
    # float32 it adds nothing, and some answers are enough to check that the engine has the trained weights.
    exact = work.policy.model.dtype == torch.float32
    rows = torch.arange(len(rollout.tokens), device=work.policy.model.device)[: PUSH_ANSWERS if exact else None]
    seen = policy_logprobs(work.policy, rollout.tokens, temperature, budget, [rows])
    gap = mismatch(seen[rows], rollout.behavior_logprobs[rows], rollout.tokens.response_mask[rows])
    check_push(gap, settings.mismatch_limit, work.policy.model.dtype)
    kl = kl_k1(rollout.behavior_logprobs if exact else seen, judged.ref_logprobs).sum(dim=1)
    return Answers(rollout.samples, judged.features, kl.cpu())


def _figures(
    work: Workspace,
    step: int,
    ours: Answers,
    incumbent: Answers,
    reference: Answers,
    judge: Judge,
    reward_model: RewardModel,
    look: Look,
) -> CandidateMetrics:
    matched_rate, matched_answers = length_matched(judge, ours.features, incumbent.features)
    against_incumbent, against_reference = (
        win_rate(judge, ours.features, theirs.features, look.prompts, look.confidence, work.generator(4))
        for theirs in (incumbent, reference)
    )
    trained = reward_model.scores(ours.features) - reward_model.scores(incumbent.features)
    return CandidateMetrics(
        step=step,
        kl=float(ours.kl.mean()),
        against_incumbent=against_incumbent,
        against_reference=against_reference,
        trained_rate=float(wins(trained).mean()),
        matched_rate=matched_rate,
        matched_answers=matched_answers,
        health=health(ours.samples),
    )


def promising(improvement: Improvement, gate: GateSettings) -> list[int]:
    """The steps of candidates worth judging: the last, the one before, then each twice as far back.

    The KL budget usually ends training before it goes wrong, so the best is near the end; if it is not, an early one is
    included. A candidate whose KL is close to that of the next one kept is left out: their answers are alike."""
    steps = improvement.candidates
    # A step's metrics describe the weights that it started with. The KL after the last update is extrapolated.
    kl = [step.kl for step in improvement.steps]
    kl.append(2 * kl[-1] - kl[-2] if len(kl) > 1 else math.inf)
    kept = [steps[-1]]
    for i in range(1, gate.candidates):
        step = steps[-min(2**i, len(steps))]
        if kl[step] <= (1 - gate.candidate_spacing) * kl[kept[-1]] and step not in kept:
            kept.append(step)
    return kept[::-1]


def _keep_answers(work: Workspace, prompts: list[Prompt], answers: dict[str, list[SampledAnswer]]) -> None:
    """Writes every judged answer, versions side by side: the first answer to each prompt, then the second to each.
    Prompts of conversations that were deleted since the round began are left out."""
    data_dir, each = work.settings.data_dir, work.settings.gate.answers
    places = [prompt * each + answer for answer in range(each) for prompt in range(len(prompts))]
    with keeping(data_dir), whole_file(work.directory / ANSWERS) as file:
        for row, place in enumerate(places):
            prompt = prompts[place // each]
            # A candidate that was dropped at the first look has no more answers.
            line = {name: asdict(samples[place]) for name, samples in answers.items() if place < len(samples)}
            for answer in line.values():
                del answer["prompt"], answer["logprobs"]
            # The conversation comes first: `sweep` reads it there to delete the lines of deleted conversations.
            asked = {
                "conversation_id": prompt.conversation_id,
                "row": row,
                "prompt": work.decode(prompt.token_ids),
                "prompt_token_ids": prompt.token_ids,
            }
            json.dump({**asked, **line}, file, ensure_ascii=False)
            file.write("\n")
    sweep(data_dir)


def _log_gate(work: Workspace, chosen: CandidateMetrics) -> None:
    with work.tensorboard() as writer:
        writer.add_scalar("gate/win_rate", chosen.against_incumbent.rate, chosen.step)
        writer.add_scalar("gate/win_rate_low", chosen.against_incumbent.low, chosen.step)
        writer.add_scalar("gate/kl", chosen.kl, chosen.step)
        writer.add_scalar("gate/length", chosen.health.length, chosen.step)

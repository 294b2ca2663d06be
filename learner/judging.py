"""The gate stage: candidates, incumbent and reference answer the held-out prompts, and the judge's votes decide."""

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from learner.checkpoint import verified
from learner.dataset import Dataset
from learner.experience import judge_rollout, policy_logprobs
from learner.gate import (
    Figures,
    Health,
    Judge,
    Verdict,
    WinRate,
    decide,
    fit_judge,
    health,
    length_matched,
    win_rate,
    wins,
)
from learner.heads import SignalTest
from learner.ppo import mismatch
from learner.reward_model import RewardModel
from learner.rollout import Sample, draw_seed, to_rollout
from learner.training import candidate, check_push
from learner.workspace import Workspace, spread
from server.erasing import ANSWERS, keeping, sweep
from server.records import Prompt

# All versions answer with the same random numbers, which no step of the training had.
GATE_DRAW = 999


def judge_candidates(
    work: Workspace, dataset: Dataset, features: Tensor, reward_model: RewardModel, signal: SignalTest
) -> Verdict:
    """Which candidate may serve, if any; every answer that was judged is kept beside it."""
    if work.done("gate"):
        return _verdict(work.round.metrics["gate"])
    gate, prompts = work.settings.gate, spread(work.prompts.held_out, work.settings.gate.prompts)
    prompts = prompts * gate.answers
    judge = fit_judge(
        features,
        dataset.judge,
        reward_model.standardiser,
        reward_model.l2,
        work.settings.reward.label_smoothing,
        gate.refits,
        work.generator(3),
    )
    steps = _promising(work, work.round.metrics["ppo"]["candidates"])
    roles = {"reference": work.round.reference_version, "incumbent": work.round.incumbent_version}
    with work.stages.stage("gate", "judging candidates", len(steps) + len(set(roles.values()))) as advance:
        # In the first round both roles are the same version: its answers are sampled and read once.
        sampled: dict[str, tuple[list[Sample], Tensor]] = {}
        for version in dict.fromkeys(roles.values()):
            samples = _published_answers(work, version, prompts)
            sampled[version] = samples, work.features_of(samples, reward_model)
            advance(1)
        answers = {role: sampled[version][0] for role, version in roles.items()}
        opponents = {role: sampled[version][1] for role, version in roles.items()}
        figures = []
        for step in steps:
            samples = answers[f"step {step}"] = _candidate_answers(work, step, prompts)
            figures.append(_measure(work, step, samples, opponents, judge, reward_model))
            advance(1)
    incumbent = health(answers["incumbent"])
    verdict = decide(figures, signal, incumbent, work.settings.ppo.kl_budget, gate)
    _keep_answers(work, prompts, answers)
    _log_gate(work, verdict)
    everything = {
        "chosen": asdict(verdict.chosen),
        "reasons": verdict.reasons,
        "candidates": [asdict(f) for f in figures],
        "incumbent_health": asdict(incumbent),
    }
    work.record("gate", {"gate": everything})
    return verdict


def _candidate_answers(work: Workspace, step: int, prompts: list[Prompt]) -> list[Sample]:
    """The policy keeps the candidate's weights, so that its log-probabilities can be taken."""
    work.policy.load(candidate(work.directory, step))
    work.engine.push(work.policy.engine_weights())
    return work.engine.sample(prompts, draw_seed(work.settings.seed, GATE_DRAW))


def _published_answers(work: Workspace, version: str, prompts: list[Prompt]) -> list[Sample]:
    from learner.policy import published_weights

    directory, manifest = verified(work.policy_directory(version))
    base = work.policy_directory(manifest.base_version) if manifest.kind == "adapter" else None
    work.engine.push(published_weights(directory, base, work.policy.model.dtype))
    return work.engine.sample(prompts, draw_seed(work.settings.seed, GATE_DRAW))


def _measure(
    work: Workspace,
    step: int,
    samples: list[Sample],
    opponents: dict[str, Tensor],
    judge: Judge,
    reward_model: RewardModel,
) -> Figures:
    rollout, ppo = to_rollout(samples), work.settings.ppo
    temperature, size = work.settings.service_temperature, ppo.micro_batch
    judged = judge_rollout(work.policy, reward_model, rollout, temperature, size, prefixes=False)
    # The served policy is the trained one: some answers are enough to see it.
    some = torch.arange(min(2 * size, len(rollout.tokens)))
    part = rollout.tokens[some]
    logprobs = policy_logprobs(work.policy, part, temperature, size)
    sampled_with = rollout.behavior_logprobs[some, : logprobs.shape[1]]
    gap = mismatch(logprobs, sampled_with, part.response_mask)
    check_push(gap, ppo.mismatch_limit, work.policy.model.dtype)
    ours, incumbent = judged.features, opponents["incumbent"]
    confidence = work.settings.gate.confidence
    prompts = len(samples) // work.settings.gate.answers
    matched_rate, matched_answers = length_matched(judge, ours, incumbent)
    return Figures(
        step=step,
        kl=float((rollout.behavior_logprobs - judged.ref_logprobs).sum(dim=1).mean()),
        against_incumbent=win_rate(judge, ours, incumbent, prompts, confidence, work.generator(4)),
        against_reference=win_rate(judge, ours, opponents["reference"], prompts, confidence, work.generator(4)),
        trained_rate=float(wins(reward_model.scores(ours) - reward_model.scores(incumbent)).mean()),
        matched_rate=matched_rate,
        matched_answers=matched_answers,
        health=health(samples),
    )


def _promising(work: Workspace, steps: list[int]) -> list[int]:
    """The last candidate, the one before, and others twice as far back each time: the KL budget mostly ends training
    before it goes wrong, so the best is near the end, and where it is not, an early one is at hand."""
    back = {min(2**i, len(steps)) for i in range(work.settings.gate.candidates)}
    return [steps[-i] for i in sorted(back, reverse=True)]


def _keep_answers(work: Workspace, prompts: list[Prompt], answers: dict[str, list[Sample]]) -> None:
    """Every answer that was judged, side by side, for whoever wants to read what changed; less what was asked in
    conversations that were deleted since the round began."""
    data_dir = work.settings.data_dir
    with keeping(data_dir), (work.directory / ANSWERS).open("w") as file:
        for row, prompt in enumerate(prompts):
            line = {name: asdict(samples[row]) for name, samples in answers.items()}
            for answer in line.values():
                del answer["prompt"], answer["logprobs"]
            # Its conversation first: by that a line goes when the conversation does.
            asked = {
                "conversation_id": prompt.conversation_id,
                "row": row,
                "prompt": work.decode(prompt.token_ids),
                "prompt_token_ids": prompt.token_ids,
            }
            json.dump({**asked, **line}, file, ensure_ascii=False)
            file.write("\n")
    sweep(data_dir)


def _log_gate(work: Workspace, verdict: Verdict) -> None:
    with work.tensorboard() as writer:
        chosen = verdict.chosen
        writer.add_scalar("gate/win_rate", chosen.against_incumbent.rate, chosen.step)
        writer.add_scalar("gate/win_rate_low", chosen.against_incumbent.low, chosen.step)
        writer.add_scalar("gate/kl", chosen.kl, chosen.step)
        writer.add_scalar("gate/length", chosen.health.length, chosen.step)


def _verdict(stored: dict[str, Any]) -> Verdict:
    chosen = dict(stored["chosen"])
    figures = Figures(
        **{
            **chosen,
            "against_incumbent": WinRate(**chosen["against_incumbent"]),
            "against_reference": WinRate(**chosen["against_reference"]),
            "health": Health(**chosen["health"]),
        }
    )
    return Verdict(figures, stored["reasons"])

"""The gate of a fine-tuned version: do its answers break a rule that votes, an operator or common sense have?

That the loss fell on what was held out is known before. People showed what they want, so it need not win: the judge may
only not be certain that it loses, where there are votes to judge by.
"""

import math

from learner.gate.answer_health import health
from learner.gate.rules import Verdict, broken_rules_of_reference
from learner.reward.linear_reward_model import LinearRewardModel
from learner.round.alignment.votes_stage import extract_features, read_votes
from learner.round.gate.checks_stage import checked
from learner.round.gate.gate_answers import Asked, ask, keep_answers, step_name
from learner.round.gate.gate_stage import CHOICE_DRAW, Bench, fit_votes, measure
from learner.round.preconditions import too_few_votes
from learner.round.workspace import Workspace, spread
from server.store.learning.fine_tuned import FineTuned
from server.store.learning.round_metrics import CandidateMetrics, GateMetrics, RoundMetrics, WinRate

UNKNOWN = WinRate(math.nan, math.nan, math.nan, 0)


def judge_fine_tuned(work: Workspace, tuned: FineTuned) -> Verdict:
    """Decides whether the fine-tuned weights are promoted, and stores every judged answer."""
    if work.done("gate") and (stored := work.round.metrics.gate):
        return Verdict(stored.chosen, stored.reasons)
    bench = make_bench(work)
    opponents = versions(work) if bench else {"incumbent": work.round.incumbent_version}
    prompts = spread(work.prompts.held_out, work.settings.gate.prompts)
    total = 1 + len(set(opponents.values()))
    with work.stages.stage("gate", "asking the fine-tuned version", total) as advance:
        answers, steps = work.settings.gate.answers, [tuned.chosen]
        asked = ask(work, work.spec, opponents, steps, prompts, answers, CHOICE_DRAW, advance)
    figures = measure(bench, tuned.chosen, asked, [len(asked.prompts)]) if bench else unjudged(asked, tuned.chosen)
    incumbent = health(asked.answers["incumbent"].samples)
    reasons = broken_rules_of_reference(figures, incumbent, tuned.length, work.settings.gate)
    verdict, checks = checked(work, Verdict(figures, reasons))
    gate = GateMetrics(figures, verdict.reasons, [figures], incumbent, checks=checks)
    keep_answers(work, [asked])
    work.record("gate", RoundMetrics(gate=gate))
    return verdict


def make_bench(work: Workspace) -> Bench | None:
    """A judge of the votes there are; None if they are too few."""
    dataset = read_votes(work)
    if too_few_votes(len(dataset.train) - int(dataset.by_machine.sum()), len(dataset.judge)):
        return None
    features = extract_features(work, dataset)
    with work.stages.stage("gate", "fitting the judge"):
        model = LinearRewardModel.fit(features, dataset.train, work.spec, work.settings.reward, work.generator(2))
        judge = fit_votes(work, dataset, features, model)
    return Bench(work, judge, model, versions(work))


def versions(work: Workspace) -> dict[str, str]:
    """The versions that it is compared with, by role."""
    return {"reference": work.round.reference_version, "incumbent": work.round.incumbent_version}


def unjudged(asked: Asked, step: int) -> CandidateMetrics:
    """The figures of a candidate without a judge."""
    ours = asked.answers[step_name(step)]
    return CandidateMetrics(
        step=step,
        kl=float(ours.kl.mean()),
        against_incumbent=UNKNOWN,
        against_reference=UNKNOWN,
        trained_rate=math.nan,
        matched_rate=math.nan,
        matched_answers=0,
        health=health(ours.samples),
    )

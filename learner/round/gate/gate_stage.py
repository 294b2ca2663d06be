"""The gate stage: a judge fitted on judge votes chooses among candidates on some held-out prompts, and confirms the
chosen one on others.

Whoever is chosen as the best of several on the same prompts looks better than it is; on other prompts it does not.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from torch import Tensor

from learner.gate.answer_health import health
from learner.gate.rules import Verdict, decide
from learner.gate.win_rate import Judge, compare, fit_judge, length_matched, looks, more_prompts_help, win_rate, wins
from learner.reward.base import RewardModel
from learner.reward.dataset import Dataset
from learner.round.gate.checks_stage import checked
from learner.round.gate.gate_answers import (
    Asked,
    ask,
    keep_answers,
    step_name,
)
from learner.round.review.canary import why_no_canary
from learner.round.review.pool import from_pool
from learner.round.workspace import Workspace, spread
from learner.settings import GateSettings
from server.store.chats.records import Prompt
from server.store.learning.records import PolicyVersion
from server.store.learning.round_metrics import CandidateMetrics, GateMetrics, Improvement, RoundMetrics, WinRate

# Numbers of the random draws that all versions answer with: to choose, and, counted on, in each batch that confirms.
CHOICE_DRAW, CONFIRMATION_DRAW = 999, 1_000
# Stream of the pool's order.
STREAM = 7


@dataclass(frozen=True)
class Bench:
    """Who judges, and whom a candidate is compared with: versions by role, `reference`, `incumbent` and, if there is a
    better one than the incumbent, `best`."""

    work: Workspace
    judge: Judge
    reward_model: RewardModel
    opponents: dict[str, str]

    @property
    def versions(self) -> list[str]:
        """The opponents, each once: in the first round incumbent and reference are the same."""
        return list(dict.fromkeys(self.opponents.values()))

    def ask(
        self, steps: list[int], prompts: list[Prompt], answers: int, draw: int, advance: Callable[[int], None]
    ) -> Asked:
        """Answers of each opponent and each candidate."""
        return ask(self.work, self.reward_model.spec, self.opponents, steps, prompts, answers, draw, advance)

    def decide(self, candidates: list[CandidateMetrics], asked: Asked, *, canary: bool) -> Verdict:
        """The verdict on candidates that answered as the incumbent did."""
        settings = self.work.settings
        incumbent = health(asked.answers["incumbent"].samples)
        return decide(candidates, incumbent, self.work.budget, settings.gate, canary=canary)


def judge_candidates(
    work: Workspace, dataset: Dataset, features: Tensor, reward_model: RewardModel, improvement: Improvement
) -> Verdict:
    """Decides which candidate is promoted, if any, and stores every judged answer."""
    if work.done("gate") and (stored := work.round.metrics.gate):
        return Verdict(stored.chosen, stored.reasons, stored.canary)
    no_canary = why_no_canary(work.store, work.settings)
    bench = Bench(work, fit_votes(work, dataset, features, reward_model), reward_model, opponents(work))
    steps = promising(improvement, work.settings.gate)
    verdict, candidates, judged = choose_and_confirm(bench, steps, canary=not no_canary)
    verdict, checks = checked(work, verdict)
    figures = GateMetrics(
        chosen=verdict.chosen,
        reasons=verdict.reasons,
        candidates=candidates,
        incumbent_health=health(judged[0].answers["incumbent"].samples),
        canary=verdict.canary,
        no_canary=no_canary,
        best_version=bench.opponents.get("best", ""),
        checks=checks,
    )
    keep_answers(work, judged)
    _log_gate(work, figures.chosen)
    work.record("gate", RoundMetrics(gate=figures))
    return verdict


def choose_and_confirm(
    bench: Bench, steps: list[int], *, canary: bool
) -> tuple[Verdict, list[CandidateMetrics], list[Asked]]:
    """The verdict on the best candidate, the figures that all were chosen by, and the answers: those that decided
    first."""
    work = bench.work
    few, others = gate_prompts(work)
    ends = looks(len(others), work.settings.gate.confirm_batch)
    total = len(bench.versions) + len(steps) + len(ends) * (len(bench.versions) + 1)
    with work.stages.stage("gate", "judging candidates", total) as advance:
        asked = bench.ask(steps, few, work.settings.gate.answers, CHOICE_DRAW, advance)
        candidates = [measure(bench, step, asked, [len(few)], earlier=steps[:n]) for n, step in enumerate(steps)]
        verdict = bench.decide(candidates, asked, canary=canary)
        if verdict.chosen.hopeless:
            return verdict, candidates, [asked]
        verdict, confirmed = confirm(bench, verdict.chosen.step, others, ends, advance, canary=canary)
    return verdict, candidates, [confirmed, asked]


def confirm(
    bench: Bench, step: int, prompts: list[Prompt], ends: list[int], advance: Callable[[int], None], *, canary: bool
) -> tuple[Verdict, Asked]:
    """The verdict on the chosen candidate, with its answers. It ends as soon as the case is clear, or only more votes
    could decide it."""
    asked, confidence = Asked([], {}), bench.work.settings.gate.confidence
    for number, (start, end) in enumerate(pairwise([0, *ends])):
        asked += bench.ask([step], prompts[start:end], 1, CONFIRMATION_DRAW + number, advance)
        figures = measure(bench, step, asked, ends)
        verdict = bench.decide([figures], asked, canary=canary)
        # What people are to decide may still become clear.
        clear = (verdict.promoted and not verdict.canary) or figures.hopeless
        if clear or not any(more_prompts_help(rate, confidence) for rate in figures.rates.values()):
            break
    return verdict, asked


def opponents(work: Workspace) -> dict[str, str]:
    """The versions that a candidate is compared with, by role. The best so far is the one that won the most against the
    reference as it was judged, of those that were promoted before, and neither rolled back nor deleted since."""
    reference, incumbent = work.round.reference_version, work.round.incumbent_version
    rolled_back = work.store.lineage.rolled_back(work.round.create_time)
    earlier = {
        policy.version: _won(policy)
        for policy in work.store.policies.page()
        if policy.state == "retired"
        and policy.reference_version == reference
        and policy.prune_time is None
        and policy.version not in rolled_back
    }
    roles = {"reference": reference, "incumbent": incumbent}
    best = max(earlier, key=lambda version: earlier[version], default="")
    if best and earlier[best] > _won(work.store.policies.get(incumbent)):
        roles["best"] = best
    return roles


def _won(policy: PolicyVersion) -> float:
    """The win rate against the reference as it was judged; a half for the reference itself, or if it was not."""
    if policy.version == policy.reference_version:
        return 0.5
    return float(policy.metrics.get("against_reference", {}).get("rate", 0.5))


def gate_prompts(work: Workspace) -> tuple[list[Prompt], list[Prompt]]:
    """Held-out prompts to choose a candidate on, at most half of them, and others to confirm it on. Prompts of nobody's
    only fill up the first batch: what is learned from people's prompts shows less on them."""
    gate, held_out = work.settings.gate, work.prompts.held_out
    few = spread(held_out, min(gate.prompts, len(held_out) // 2))
    others = list(islice(without(held_out, [*few, *work.prompts.train]), gate.confirm_prompts))
    missing = max(min(gate.confirm_batch, gate.confirm_prompts) - len(others), 0)
    nobodys = without((prompt for _, prompt in from_pool(work, STREAM)), [*few, *others, *work.prompts.train])
    return few, [*others, *islice(nobodys, missing)]


def without(prompts: Iterable[Prompt], known: list[Prompt]) -> Iterator[Prompt]:
    """The prompts that ask something else than the known ones."""
    asked = {tuple(prompt.token_ids) for prompt in known}
    return (prompt for prompt in prompts if tuple(prompt.token_ids) not in asked)


def measure(bench: Bench, step: int, asked: Asked, ends: list[int], earlier: Sequence[int] = ()) -> CandidateMetrics:
    """The figures of one candidate, compared with `earlier` ones, too; its intervals hold for looks at all `ends`
    together."""
    work, judge, model = bench.work, bench.judge, bench.reward_model
    ours, incumbent = asked.answers[step_name(step)], asked.answers["incumbent"]

    def against(role: str) -> WinRate:
        won = compare(judge, ours.features, asked.answers[role].features, len(asked.prompts))
        return win_rate(won, ends, work.settings.gate.confidence, work.generator(4))

    matched_rate, matched_answers = length_matched(judge, ours.features, incumbent.features)
    return CandidateMetrics(
        step=step,
        kl=float(ours.kl.mean()),
        against_incumbent=against("incumbent"),
        against_reference=against("reference"),
        trained_rate=float(wins(model.scores(ours.features) - model.scores(incumbent.features)).mean()),
        matched_rate=matched_rate,
        matched_answers=matched_answers,
        health=health(ours.samples),
        against_best=against("best") if "best" in bench.opponents else None,
        loses_to=[other for other in earlier if against(step_name(other)).loses],
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


def fit_votes(work: Workspace, dataset: Dataset, features: Tensor, reward_model: RewardModel) -> Judge:
    """The judge of the votes that judge."""
    return fit_judge(
        features,
        dataset.judge,
        reward_model.standardiser,
        reward_model.l2,
        work.settings.reward.label_smoothing,
        work.settings.gate.refits,
        work.generator(3),
    )


def _log_gate(work: Workspace, chosen: CandidateMetrics) -> None:
    with work.tensorboard() as writer:
        writer.add_scalar("gate/win_rate", chosen.against_incumbent.rate, chosen.step)
        writer.add_scalar("gate/win_rate_low", chosen.against_incumbent.low, chosen.step)
        writer.add_scalar("gate/kl", chosen.kl, chosen.step)
        writer.add_scalar("gate/length", chosen.health.length, chosen.step)

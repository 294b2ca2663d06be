"""The gate: the interval includes the judge's own error, and every rule can fail."""

import math
from collections.abc import Callable

import pytest
import torch

from learner.gate.answer_health import health, repetition
from learner.gate.rules import Verdict, decide, over_optimised
from learner.gate.win_rate import (
    Judge,
    by_prompt,
    compare,
    fit_judge,
    length_matched,
    look_tail,
    looks,
    more_prompts_help,
    win_rate,
)
from learner.improve.budget import Budget
from learner.model.rollout import SampledAnswer
from learner.reward.likelihood import A, B
from learner.reward.linear_heads import VoteTensors
from learner.reward.standardiser import Standardiser
from learner.settings import GateSettings
from server.store.learning.round_metrics import AnswerHealth, CandidateMetrics, WinRate

SETTINGS = GateSettings()
BUDGET = Budget(6.0, per_token=0.25)
INCUMBENT = AnswerHealth(length=60, empty=0.0, ended=0.1, repetition=0.01)


def figures(**changes: object) -> CandidateMetrics:
    values: dict[str, object] = {
        "step": 4,
        "kl": 3.0,
        "against_incumbent": WinRate(0.7, 0.55, 0.8, 60),
        "against_reference": WinRate(0.7, 0.56, 0.8, 60),
        "trained_rate": 0.8,
        "matched_rate": 0.6,
        "matched_answers": 30,
        "health": INCUMBENT,
        **changes,
    }
    return CandidateMetrics(**values)  # type: ignore[arg-type]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_candidate_that_passes_every_rule_is_promoted() -> None:
    verdict = decide([figures()], INCUMBENT, BUDGET, SETTINGS, canary=False)
    assert verdict.promoted
    assert verdict.reasons == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"against_incumbent": WinRate(0.6, 0.5, 0.7, 60)}, "against the incumbent may be chance"),
        ({"against_reference": WinRate(0.6, 0.49, 0.7, 60)}, "against the reference may be chance"),
        ({"kl": 6.1}, "6.10 nats is over the budget of 6.00"),
        ({"kl": 5.1, "health": AnswerHealth(20, 0, 0.1, 0.01)}, "5.10 nats is over the budget of 5.00"),
        ({"health": AnswerHealth(14, 0, 0.1, 0.01)}, "0.23 times as long"),
        ({"health": AnswerHealth(121, 0, 0.1, 0.01)}, "2.02 times as long"),
        ({"health": AnswerHealth(60, 0.06, 0.1, 0.01)}, "6% of the answers are empty"),
        ({"health": AnswerHealth(60, 0, 0.1, 0.17)}, "17% of the 4-grams are repeated"),
    ],
)
def test_each_rule_rejects_and_says_why(changes: dict[str, object], reason: str) -> None:
    verdict = decide([figures(**changes)], INCUMBENT, BUDGET, SETTINGS, canary=False)
    assert not verdict.promoted
    assert len(verdict.reasons) == 1
    assert reason in verdict.reasons[0]


@pytest.mark.parametrize(
    ("opponent", "name"),
    [("against_incumbent", "incumbent"), ("against_reference", "reference"), ("against_best", "best version so far")],
)
def test_people_decide_about_a_candidate_unless_the_judge_is_certain(opponent: str, name: str) -> None:
    def judged(low: float, high: float) -> Verdict:
        rate = WinRate((low + high) / 2, low, high, 60)
        return decide([figures(**{opponent: rate})], INCUMBENT, BUDGET, SETTINGS, canary=True)

    better, open_, worse = judged(0.51, 0.8), judged(0.3, 0.5), judged(0.3, 0.48)
    assert (better.promoted, better.canary) == (True, False)
    assert (open_.promoted, open_.canary) == (True, True)
    assert (worse.reasons, worse.canary) == ([f"It loses to the {name}: 0.39 [0.30, 0.48]."], False)


def test_at_once_only_what_clearly_beats_all_three_where_people_can_decide() -> None:
    # Within the margin that suffices where they cannot.
    close = figures(against_best=WinRate(0.52, 0.46, 0.60, 60))
    assert decide([close], INCUMBENT, BUDGET, SETTINGS, canary=True).canary
    assert decide([close], INCUMBENT, BUDGET, SETTINGS, canary=False).promoted


def test_a_rate_that_could_not_be_measured_is_refused() -> None:
    unknown = figures(against_incumbent=WinRate(math.nan, math.nan, math.nan, 60))
    assert not decide([unknown], INCUMBENT, BUDGET, SETTINGS, canary=True).promoted


def test_where_people_cannot_decide_the_judge_must_be_certain() -> None:
    doubted = figures(against_incumbent=WinRate(0.6, 0.49, 0.7, 60))
    assert not decide([doubted], INCUMBENT, BUDGET, SETTINGS, canary=False).promoted


def test_an_operator_may_put_every_candidate_to_the_vote() -> None:
    always = GateSettings(canary="always")
    verdict = decide([figures()], INCUMBENT, BUDGET, always, canary=True)
    assert (verdict.promoted, verdict.canary) == (True, True)


def test_people_do_not_decide_about_a_candidate_that_breaks_another_rule() -> None:
    close = WinRate(0.56, 0.46, 0.8, 60)
    verdict = decide([figures(against_incumbent=close, kl=6.1)], INCUMBENT, BUDGET, SETTINGS, canary=True)
    assert (verdict.canary, len(verdict.reasons)) == (False, 1)
    assert "over the budget" in verdict.reasons[0]


def test_what_only_the_trained_model_likes_is_over_optimised() -> None:
    def judged(step: int, trained: float, loses_to: list[int]) -> CandidateMetrics:
        return figures(step=step, trained_rate=trained, loses_to=loses_to)

    early, late = judged(4, 0.7, []), judged(8, 0.9, [4])
    assert over_optimised(late, [early, late])
    verdict = decide([early, late], INCUMBENT, BUDGET, SETTINGS, canary=False)
    assert (verdict.chosen.step, verdict.promoted) == (4, True)
    # Where the trained model does not like it either, and seen from the earlier one, nothing parted.
    assert not over_optimised(judged(8, 0.6, [4]), [early])
    assert not over_optimised(early, [early, late])


def test_a_lucky_early_candidate_does_not_keep_the_others_out() -> None:
    """Rates on 48 answers, as they were seen; by the voters' taste these candidates win 0.60, 0.68 and 0.79."""

    def judged(step: int, kl: float, trained: float, won: float) -> CandidateMetrics:
        rate = WinRate(won, won - 0.2, won + 0.2, 24)
        return figures(step=step, kl=kl, trained_rate=trained, against_incumbent=rate, against_reference=rate)

    seen = [judged(1, 0.27, 0.631, 0.708), judged(3, 2.49, 0.714, 0.5), judged(4, 5.31, 0.929, 0.512)]
    assert decide(seen, INCUMBENT, BUDGET, SETTINGS, canary=True).chosen.step == 4


def test_both_models_choose_the_candidate() -> None:
    """The judge alone prefers whoever differs little from the incumbent."""

    def judged(step: int, trained: float, won: float, low: float) -> CandidateMetrics:
        return figures(step=step, trained_rate=trained, against_incumbent=WinRate(won, low, 0.9, 60))

    candidates = [judged(1, 0.59, 0.53, 0.51), judged(3, 0.77, 0.59, 0.51), judged(6, 0.86, 0.56, 0.51)]
    # Means of 0.56, 0.68 and 0.71.
    assert decide(candidates, INCUMBENT, BUDGET, SETTINGS, canary=False).chosen.step == 6
    assert candidates[2].promise == pytest.approx(0.71)


def test_the_best_sound_candidate_is_chosen_not_the_last_or_the_highest() -> None:
    early = figures(step=2, against_incumbent=WinRate(0.6, 0.52, 0.7, 60))
    best = figures(step=4)
    collapsed = figures(
        step=6, against_incumbent=WinRate(0.95, 0.9, 0.99, 60), against_reference=WinRate(0.95, 0.9, 0.99, 60), kl=9.0
    )
    assert decide([early, best, collapsed], INCUMBENT, BUDGET, SETTINGS, canary=False).chosen.step == 4


def judge_of(weights: list[list[float]]) -> Judge:
    refits = torch.tensor(weights)
    return Judge(Standardiser(torch.zeros(2), torch.ones(2)), torch.eye(2), refits[:1], refits)


def rated(judge: Judge, ours: torch.Tensor, theirs: torch.Tensor, prompts: int) -> WinRate:
    return win_rate(compare(judge, ours, theirs, prompts), [prompts], 0.95, seeded())


def test_win_rate_by_hand() -> None:
    ours = torch.tensor([[1.0, 0], [1.0, 0], [-1.0, 0], [0.0, 0]])
    rate = rated(judge_of([[1.0, 0]] * 200), ours, torch.zeros(4, 2), 4)
    assert rate.rate == 0.625  # two wins, a loss and a draw
    assert rate.low < 0.625 < rate.high
    mirrored = rated(judge_of([[1.0, 0]] * 200), torch.zeros(4, 2), ours, 4)
    assert mirrored.rate == 0.375


def test_answers_are_compared_with_all_answers_to_the_same_prompt() -> None:
    # Two prompts with two answers each. Prompt 0: 3 and 1 against 2 and 0 wins 3 of 4; prompt 1: 0 and 0 against 5 and
    # 0 draws two and loses two.
    ours, theirs = torch.tensor([[3.0, 1.0, 0.0, 0.0]]), torch.tensor([[2.0, 0.0, 5.0, 0.0]])
    assert by_prompt(ours, theirs, 2).tolist() == [[0.75, 0.25]]


def test_an_uncertain_judge_widens_the_interval() -> None:
    # 60 wins of 60 by the point fit, but half of the refits say the opposite.
    ours = torch.tensor([[1.0, 0]]).expand(60, 2)
    sure = rated(judge_of([[1.0, 0]] * 200), ours, torch.zeros(60, 2), 60)
    unsure = rated(judge_of([[1.0, 0], [-1.0, 0]] * 100), ours, torch.zeros(60, 2), 60)
    assert sure.low == 1.0
    assert (unsure.rate, unsure.low, unsure.high) == (1.0, 0.0, 1.0)


def test_few_prompts_widen_the_interval() -> None:
    few = torch.tensor([[1.0, 0]] * 6 + [[-1.0, 0]] * 4)
    many = few.repeat(20, 1)
    widths = []
    for ours in (few, many):
        rate = rated(judge_of([[1.0, 0]] * 400), ours, torch.zeros_like(ours), len(ours))
        assert rate.rate == pytest.approx(0.6)
        widths.append(rate.high - rate.low)
    # Binomial: 1.96 * 2 * sqrt(.24 / n).
    assert widths[0] == pytest.approx(0.6, abs=0.11)
    assert widths[1] == pytest.approx(0.136, abs=0.03)


def test_length_matched_counts_only_answers_alike_in_length() -> None:
    theirs = torch.tensor([[0.0, 4.0]] * 3)
    ours = torch.tensor([[1.0, 4.1], [-1.0, 3.9], [1.0, 3.0]])
    rate, prompts = length_matched(judge_of([[1.0, 0.0]]), ours, theirs)
    assert (rate, prompts) == (0.5, 2)


def test_a_judge_learns_a_taste_from_votes(make_votes: Callable[..., VoteTensors]) -> None:
    generator = seeded()
    features = torch.randn(160, 6, generator=generator)
    better = (features[::2, 0] > features[1::2, 0]).tolist()
    votes = make_votes([(2 * i, 2 * i + 1, A if won else B) for i, won in enumerate(better)])
    judge = fit_judge(features, votes, Standardiser(torch.zeros(6), torch.ones(6)), 1.0, 0.05, 100, generator)
    theirs = torch.randn(50, 6, generator=generator)
    ours = theirs + torch.tensor([1.5, 0, 0, 0, 0, 0])
    assert rated(judge, ours, theirs, 50).low > 0.8
    same = rated(judge, theirs[torch.randperm(50, generator=generator)], theirs, 50)
    assert same.low < 0.5 < same.high


def test_health_by_hand() -> None:
    samples = [
        SampledAnswer([1], [5, 2], [0.0, 0.0], "word", "stop"),
        SampledAnswer([1], [2], [0.0], " ", "stop"),
        SampledAnswer([1], [3, 3, 3, 3, 3, 3], [0.0] * 6, "aaaaaa", "length"),
    ]
    found = health(samples)
    assert (found.length, found.empty, found.ended) == (3.0, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found.repetition == pytest.approx(2 / 9)  # three 4-grams, one of them distinct
    assert repetition([1, 2, 3, 4, 5]) == 0


def test_the_gate_looks_after_each_batch() -> None:
    assert looks(256, 64) == [64, 128, 192, 256]
    assert looks(70, 64) == [64, 70]
    assert looks(8, 64) == [8]


@pytest.mark.parametrize(
    ("judge_sd", "prompts_sd", "looks", "expected"),
    [
        # Pocock's constants (Jennison and Turnbull 2000, table 2.1): 1.875, 2.067 and 2.122 standard errors.
        (0.0, 0.06, [64, 128], 0.0304),
        (0.0, 0.06, [64, 128, 192, 256], 0.0194),
        (0.0, 0.06, [64, 128, 192, 256, 320], 0.0169),
        # Where all looks share the judge's error, looking again costs nothing.
        (0.06, 0.0, [64, 128, 192, 256], 0.05),
        (0.0, 0.06, [64], 0.05),
        (0.06, 0.06, [64], 0.05),
    ],
)
def test_all_looks_together_err_as_often_as_one(
    judge_sd: float, prompts_sd: float, looks: list[int], expected: float
) -> None:
    assert look_tail(judge_sd, prompts_sd, looks, 64, 0.05) == pytest.approx(expected, abs=0.001)


def test_looks_that_share_half_of_their_error_cost_something_in_between() -> None:
    assert 0.022 < look_tail(0.06, 0.06, [64, 128, 192, 256], 64, 0.05) < 0.045


@pytest.mark.parametrize(
    ("rate", "confidence", "helps"),
    [
        # 0.06 from a half: neither part alone is so large.
        (WinRate(0.56, 0.46, 0.66, 64, 0.06, 0.02), 0.9, True),
        # The judge may be wrong by 1.645 * 0.06 = 0.10, and the prompts by 0.03: more prompts show 0.57 at best.
        (WinRate(0.54, 0.43, 0.65, 64, 0.02, 0.06), 0.9, False),
        (WinRate(0.54, 0.43, 0.65, 64, 0.04, 0.06), 0.9, True),
        # The judge by 0.14, and the prompts by 0.09: they show 0.63 at best.
        (WinRate(0.54, 0.40, 0.68, 64, 0.04, 0.06), 0.98, False),
        # Decided.
        (WinRate(0.70, 0.55, 0.80, 64, 0.06, 0.02), 0.9, False),
        (WinRate(0.30, 0.20, 0.45, 64, 0.06, 0.02), 0.9, False),
    ],
)
def test_more_prompts_help_only_against_the_prompts_error(rate: WinRate, confidence: float, helps: bool) -> None:
    assert more_prompts_help(rate, confidence) == helps


def test_the_parts_of_the_error() -> None:
    # Six wins of ten by the point fit; half of the refits say the opposite.
    ours = torch.tensor([[1.0, 0]] * 6 + [[-1.0, 0]] * 4)
    rate = rated(judge_of([[1.0, 0], [-1.0, 0]] * 100), ours, torch.zeros(10, 2), 10)
    # sqrt(.24 / 10), and refits of .6 and .4.
    assert (rate.prompts_sd, rate.judge_sd) == (pytest.approx(0.1549, abs=1e-4), pytest.approx(0.1, abs=1e-3))
    assert rate.explained.endswith("with a standard error of 0.15 by the prompts and 0.10 by the judge's votes")
    assert WinRate(0.6, 0.5, 0.7, 60).explained == "0.60 [0.50, 0.70]"


@pytest.mark.parametrize(
    ("best", "sound"),
    [
        (WinRate(0.52, 0.46, 0.60, 60), True),
        (WinRate(0.52, 0.45, 0.60, 60), False),
        (WinRate(0.50, 0.46, 0.60, 60), False),
    ],
)
def test_a_candidate_is_no_worse_than_the_best_version_so_far(best: WinRate, sound: bool) -> None:
    verdict = decide([figures(against_best=best)], INCUMBENT, BUDGET, SETTINGS, canary=False)
    assert verdict.promoted == sound
    assert verdict.reasons == ([] if sound else [f"It may be worse than the best version so far: {best}."])


def test_a_candidate_that_surely_loses_is_hopeless() -> None:
    assert figures(against_best=WinRate(0.3, 0.2, 0.4, 32)).hopeless
    assert not figures(against_incumbent=WinRate(0.4, 0.3, 0.51, 32)).hopeless
    assert figures(against_incumbent=WinRate(0.4, 0.3, 0.49, 32)).hopeless
    assert figures(against_reference=WinRate(0.3, 0.2, 0.4, 32)).hopeless

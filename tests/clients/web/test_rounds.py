from datetime import UTC, datetime

from prefloop.v1.feedback_pb2 import FEEDBACK_KIND_CHOICE, FEEDBACK_KIND_CORRECTION
from prefloop.v1.policy_pb2 import ROUND_STATE_FAILED, ROUND_STATE_PROMOTED, Duel, Round, VoteCount

from clients.web.board import duel_share, votes_by_day
from clients.web.rounds import RoundFigures, win_rates
from tests.clients.web.test_board import METRICS


def judged() -> RoundFigures:
    round_ = Round(round_id="round_abcdef0123", state=ROUND_STATE_PROMOTED, policy_version="v0001")
    round_.metrics.update(METRICS.to_json())
    return RoundFigures(round_)


def test_a_rounds_figures() -> None:
    figures = judged()
    assert (figures.short_id, figures.state, figures.promoted) == ("abcdef", "promoted", True)
    assert (figures.votes, figures.accuracy, figures.kl, figures.minutes) == (150, 0.69, 2.18, 4.5)
    assert figures.win_rate
    assert (figures.win_rate.rate, str(figures.win_rate)) == (0.73, "0.73 [0.63, 0.83]")
    assert figures.seconds == [("improve", 145), ("gate", 81), ("activate", 21), ("reward_model", 14), ("start", 9)]
    assert [(one["step"], one["kl"], one["chosen"]) for one in figures.candidates] == [
        (3, 0.73, False),
        (5, 2.18, True),
    ]
    assert [chart.title for chart in figures.curves] == [
        "Score and its uncertainty",
        "KL to the reference",
        "Answer length",
        "Entropy",
        "Clipped ratios",
        "Value loss",
        "Trainer vs. engine",
        "KL penalty weight",
    ]


def test_a_round_that_got_nowhere_has_no_figures() -> None:
    figures = RoundFigures(Round(round_id="round_1", state=ROUND_STATE_FAILED))
    assert (figures.votes, figures.accuracy, figures.kl, figures.win_rate, figures.minutes) == (None,) * 5
    assert (figures.curves, figures.candidates, figures.seconds) == ([], [], [])
    assert win_rates([figures]).dots == []


def test_a_figure_that_an_older_learner_did_not_write_leaves_its_curve_out() -> None:
    round_ = Round(round_id="round_1")
    round_.metrics.update(
        {"improvement": {"steps": [{"step": 0, "kl": 0.0, "score": 0.1}, {"step": 1, "kl": 0.4, "score": 0.2}]}}
    )
    charts = RoundFigures(round_).curves
    assert [chart.title for chart in charts] == ["Score and its uncertainty", "KL to the reference"]
    assert charts[0].band == ()


def test_votes_fill_the_last_thirty_days() -> None:

    counts = [
        VoteCount(date="2026-03-01", kind=FEEDBACK_KIND_CHOICE, votes=7),
        VoteCount(date="2026-03-01", kind=FEEDBACK_KIND_CORRECTION, votes=2),
    ]
    days = votes_by_day(counts, datetime(2026, 3, 2, 0, 30, tzinfo=UTC))
    assert len(days) == 30
    assert days[0] == ("2026-02-01", [0, 0, 0, 0])
    assert days[-2:] == [("2026-03-01", [7, 0, 2, 0]), ("2026-03-02", [0, 0, 0, 0])]


def test_a_duels_share_has_wilsons_interval_and_draws_do_not_count() -> None:
    share = duel_share(Duel(wins=15, losses=5, draws=40))
    assert share
    assert str(share) == "0.75 [0.53, 0.89]"
    assert duel_share(Duel(draws=3)) is None

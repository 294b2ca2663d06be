"""The operator's board: the served version, votes, rounds, and three actions.

Each action says beforehand what it will do. Promote and roll back name the version that the page showed as active; if
another one has become active since, nothing happens and the page says so.
"""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta

from prefloop.v1.feedback_pb2 import (
    FEEDBACK_KIND_CHOICE,
    FEEDBACK_KIND_CORRECTION,
    FEEDBACK_KIND_DEMONSTRATION,
    FEEDBACK_KIND_THUMB,
)
from prefloop.v1.policy_pb2 import (
    POLICY_STATE_ACTIVE,
    POLICY_STATE_CANARY,
    POLICY_STATE_CANDIDATE,
    POLICY_STATE_FAILED,
    POLICY_STATE_REJECTED,
    POLICY_STATE_RETIRED,
    Duel,
    VoteCount,
)
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from clients.interval import wilson
from clients.web.charts.chart import Chart, stacks
from clients.web.rounds import Interval, RoundFigures, win_rates
from clients.web.sign_in import SignedIn
from clients.web.site import Site, enter, first, form_of

DAYS = 30
LISTED = 50
SHOWN_SAMPLES = 12
KINDS = {
    FEEDBACK_KIND_CHOICE: "choices",
    FEEDBACK_KIND_THUMB: "thumbs",
    FEEDBACK_KIND_CORRECTION: "corrections",
    FEEDBACK_KIND_DEMONSTRATION: "demonstrations",
}
STATES = {
    POLICY_STATE_CANDIDATE: "candidate",
    POLICY_STATE_CANARY: "canary",
    POLICY_STATE_ACTIVE: "active",
    POLICY_STATE_RETIRED: "retired",
    POLICY_STATE_REJECTED: "rejected",
    POLICY_STATE_FAILED: "failed to load",
}


async def show(request: Request) -> Response:
    site, person = await enter_operator(request)
    client = person.client
    active, learner, counts, rounds, versions = await asyncio.gather(
        client.active_policy(),
        client.learner(),
        client.count_votes(DAYS),
        first(LISTED, client.rounds()),
        first(LISTED, client.policies()),
    )
    figures = [RoundFigures(round_) for round_ in rounds]
    columns = votes_by_day(counts, datetime.now(UTC))
    return await site.page(
        request,
        person,
        "board.html.j2",
        active=active,
        duel_share=duel_share(active.duel) if active.HasField("duel") else None,
        learner=learner,
        rounds=figures,
        win_rates=win_rates(figures),
        kinds=list(KINDS.values()),
        columns=columns,
        votes_chart=votes_chart(columns),
        versions=versions,
        states=STATES,
    )


async def show_round(request: Request) -> Response:
    """Shows one round: its metrics, its curves, and answers before and after."""
    site, person = await enter_operator(request)
    round_id = request.path_params["round_id"]
    found = await first(1, (one async for one in person.client.rounds() if one.round_id == round_id))
    if not found:
        raise HTTPException(404)
    samples = await first(SHOWN_SAMPLES, person.client.round_samples(round_id))
    return await site.page(request, person, "round.html.j2", round=RoundFigures(found[0]), samples=samples)


async def request_round(request: Request) -> Response:
    _, person = await enter(request)
    await person.client.request_round()
    return to_board()


async def promote(request: Request) -> Response:
    _, person = await enter(request)
    form = await form_of(request)
    await person.client.activate(form["version"], expected_active_version=form["expected"], reason=form["reason"])
    return to_board()


async def rollback(request: Request) -> Response:
    _, person = await enter(request)
    form = await form_of(request)
    await person.client.rollback(form["version"], expected_active_version=form["expected"], reason=form["reason"])
    return to_board()


async def enter_operator(request: Request) -> tuple[Site, SignedIn]:
    """The site and the signed-in operator. The server checks each call as well."""
    site, person = await enter(request)
    if not person.is_operator:
        raise HTTPException(403, "The board is for operators.")
    return site, person


def to_board() -> Response:
    return RedirectResponse("/board", 303)


def votes_by_day(counts: list[VoteCount], now: datetime) -> list[tuple[str, list[int]]]:
    """(day, votes by kind in the order of KINDS) for each of the last days, oldest first."""
    found = Counter({(count.date, count.kind): count.votes for count in counts})
    days = [f"{now - timedelta(days=ago):%Y-%m-%d}" for ago in reversed(range(DAYS))]
    return [(day, [found[day, kind] for kind in KINDS]) for day in days]


def votes_chart(columns: list[tuple[str, list[int]]]) -> Chart:
    """A chart of each day's votes, stacked by kind."""
    return stacks(
        "Votes by day", "votes", "day (UTC)", list(KINDS.values()), [(day[5:], counts) for day, counts in columns]
    )


def duel_share(duel: Duel) -> Interval | None:
    """The share of the choices between two versions that the newer one won; None if there are no choices yet."""
    decided = duel.wins + duel.losses
    return Interval(duel.wins / decided, *wilson(duel.wins, decided)) if decided else None


ROUTES = [
    Route("/board", show),
    Route("/board/rounds/{round_id}", show_round),
    Route("/board/round", request_round, methods=["POST"]),
    Route("/board/promote", promote, methods=["POST"]),
    Route("/board/rollback", rollback, methods=["POST"]),
]

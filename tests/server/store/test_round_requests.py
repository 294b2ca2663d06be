"""Asking for a round: who hears it, who takes it, and that none stays open for ever."""

import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlite_utils
from prefloop.v1 import policy_pb2

from server.admin.backup import back_up
from server.store.learning.round_requests import OUTCOME_CHARACTERS
from server.store.sqlite.migrations import migrations
from server.store.store import Store
from tests.server.conftest import Running
from tests.server.rpc.test_rpcs import ANN, BOB, chat, refusal
from tests.server.store.test_store import answer

REFUSED = grpc.StatusCode.FAILED_PRECONDITION


def grow_old(store: Store, seconds: float) -> None:
    """As if that much time had passed since the last heartbeats."""
    store._db.execute("UPDATE listeners SET uptime = uptime - ?", [seconds])


async def ask(running: Running, user: Any = ANN) -> Any:
    return (await running.policies.RequestRound(policy_pb2.RequestRoundRequest(), metadata=user)).learner


async def look(running: Running) -> Any:
    return (await running.policies.GetLearner(policy_pb2.GetLearnerRequest(), metadata=ANN)).learner


async def refused(running: Running) -> tuple[list[str], str]:
    code, message, details = await refusal(running.policies.RequestRound(policy_pb2.RequestRoundRequest()))
    assert code == REFUSED
    return details, message


async def test_where_nobody_listens_that_is_said_with_what_to_start(running: Running) -> None:
    nobody = (
        ["NO_LEARNER"],
        "No learner listens: start `learner schedule` on the server's data directory, with --on-request where no clock "
        "should start rounds.",
    )
    assert await refused(running) == nobody
    learner = await look(running)
    assert (learner.listening, learner.HasField("request_time"), learner.new_votes) == (False, False, 0)
    await running.store(lambda store: store.round_requests.listen("here", None))
    assert (await look(running)).listening
    # One that was killed half a minute ago says nothing any more.
    await running.store(lambda store: grow_old(store, 31))
    assert await refused(running) == nobody
    assert not (await look(running)).listening
    await running.store(lambda store: store.round_requests.listen("here", None))
    await running.store(lambda store: store.round_requests.leave("here"))
    assert await refused(running) == nobody


async def test_a_request_goes_from_asked_to_taken_to_over(running: Running) -> None:
    started, *_ = await chat(running)
    await running.store(lambda store: store.feedback.submit_thumb("ann", started.started.response_id, up=True))
    await running.store(lambda store: store.round_requests.listen("here", 1_800_000_000.5))
    waiting = await ask(running)
    assert (waiting.listening, waiting.new_votes, waiting.next_round_time.ToMicroseconds()) == (
        True,
        1,
        1_800_000_000_500_000,
    )
    assert (waiting.HasField("request_time"), waiting.HasField("end_time"), waiting.outcome) == (True, False, "")
    # Asked again, by whomever, before it starts.
    assert await ask(running, BOB) == waiting
    assert await running.store(lambda store: len(store._db.rows("SELECT 1 FROM round_requests"))) == 1
    request = await running.store(lambda store: store.round_requests.take("here"))
    assert request == 1
    assert await refused(running) == (["ROUND_RUNNING"], "A round is at work; ask again when it is over.")
    assert await running.store(lambda store: store.round_requests.end(1, "here", "nothing to learn: so"))
    over = await look(running)
    assert over.outcome == "nothing to learn: so"
    assert over.end_time.ToMicroseconds() >= over.request_time.ToMicroseconds() == waiting.request_time.ToMicroseconds()
    # And the next one is a new one.
    again = await ask(running)
    assert again.request_time.ToMicroseconds() > over.request_time.ToMicroseconds()
    assert (again.HasField("end_time"), again.outcome) == (False, "")
    columns = {row["name"] for row in await running.store(lambda s: s._db.rows("PRAGMA table_info(round_requests)"))}
    assert columns == {"id", "listener", "create_time", "end_time", "outcome"}


async def test_a_round_at_work_is_shown_and_keeps_requests_out(running: Running) -> None:
    def begin(store: Store) -> Any:
        store.round_requests.listen("here", None)
        fence = store.leases.acquire("learner", "by hand", 60)
        assert fence
        round_ = store.rounds.create(0, {}, reference_version="v0000", fence=fence)
        store.rounds.update(round_.id, stage="ppo", fence=fence)
        return round_.id, fence

    round_id, fence = await running.store(begin)
    learner = await look(running)
    assert (learner.running_round_id, learner.stage) == (round_id, "ppo")
    assert not learner.HasField("next_round_time")
    assert (await refused(running))[0] == ["ROUND_RUNNING"]
    # Stopped or killed, it keeps nobody out: what is asked for goes on with it.
    await running.store(lambda store: store.leases.release(fence))
    assert ((await look(running)).running_round_id, (await look(running)).stage) == ("", "")
    assert (await ask(running)).HasField("request_time")


def test_of_two_learners_that_look_at_once_one_takes_it(tmp_path: Path) -> None:
    stores = [Store.open(tmp_path) for _ in range(2)]
    for number in range(30):
        names = ["one", "two"]
        for store, name in zip(stores, names, strict=True):
            store.round_requests.listen(name, None)
        stores[0].round_requests.ask()
        together, taken = threading.Barrier(2), dict[str, int | None]()

        def take(store: Store, name: str, together: Any = together, taken: Any = taken) -> None:
            together.wait(10)
            taken[name] = store.round_requests.take(name)

        threads = [threading.Thread(target=take, args=pair) for pair in zip(stores, names, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert sorted(map(str, taken.values())) == [str(number + 1), "None"]
        [winner] = [name for name, request in taken.items() if request]
        assert stores[0].round_requests.end(number + 1, winner, "so")
    for store in stores:
        store.close()


def test_a_request_whose_learner_went_away_is_taken_again_and_ended_once(store: Store) -> None:
    requests = store.round_requests
    requests.listen("first", None)
    requests.ask()
    assert requests.take("first") == 1
    requests.listen("second", None)
    assert not requests.waits()
    assert requests.take("second") is None
    store._db.execute("UPDATE listeners SET uptime = uptime - 31 WHERE id = 'first'")
    assert requests.waits()
    # Also asked again it is the same: it was not answered.
    assert requests.ask().end_time is None
    assert requests.take("second") == 1
    # It was only asleep.
    requests.listen("first", None)
    assert not requests.end(1, "first", "too late")
    assert requests.end(1, "second", "so")
    assert not requests.end(1, "second", "twice")
    last = requests.last()
    assert last
    assert last.outcome == "so"


def test_what_a_learner_leaves_waits_for_the_next(store: Store) -> None:
    requests = store.round_requests
    requests.listen("first", None)
    requests.ask()
    assert requests.take("first") == 1
    requests.leave("first")
    requests.listen("second", None)
    assert requests.take("second") == 1
    # Nothing is left of those who were killed long ago.
    grow_old(store, 3001)
    requests.listen("third", None)
    assert store._db.rows("SELECT id FROM listeners") == [{"id": "third"}]


def test_nobody_takes_a_request_while_a_learner_is_at_work(store: Store) -> None:
    store.round_requests.listen("here", None)
    store.round_requests.ask()
    fence = store.leases.acquire("learner", "by hand", 60)
    assert fence
    assert (store.round_requests.waits(), store.round_requests.take("here")) == (False, None)
    # It waits, and is the same.
    assert store.round_requests.ask().outcome == ""
    store.leases.release(fence)
    assert (store.round_requests.waits(), store.round_requests.take("here")) == (True, 1)


def test_an_outcome_without_end_is_cut(store: Store) -> None:
    store.round_requests.listen("here", None)
    store.round_requests.ask()
    store.round_requests.take("here")
    store.round_requests.end(1, "here", "x" * 100_000)
    last = store.round_requests.last()
    assert last
    assert len(last.outcome) == OUTCOME_CHARACTERS == 2000


def test_a_backup_asks_for_nothing(store: Store, tmp_path: Path) -> None:
    store.round_requests.listen("here", None)
    store.round_requests.ask()
    policies = tmp_path / "policies" / "v0000"
    policies.mkdir(parents=True)
    back_up(tmp_path, tmp_path / "backup")
    copy = Store.open(tmp_path / "backup")
    learner = copy.learner()
    assert learner.request
    assert (learner.listening, learner.request.outcome) == (False, "It was under way when this backup was made.")
    assert not copy.round_requests.waits()
    copy.close()
    assert store.round_requests.waits()


def test_a_database_from_before_knows_no_learner_and_counts_its_votes(tmp_path: Path) -> None:
    newer = Store.open(tmp_path / "newer")
    newer.feedback.submit_thumb("ann", answer(newer, newer.conversations.create("ann", "hello")), up=True)
    [vote] = newer._db.rows("SELECT * FROM feedback")
    newer.close()
    old = sqlite_utils.Database(tmp_path / "prefloop.db")
    migrations.apply(old, stop_before="m009_round_requests")
    old.execute("PRAGMA foreign_keys = OFF")
    old.execute(f"INSERT INTO feedback VALUES ({', '.join('?' * len(vote))})", list(vote.values()))
    old.conn.commit()
    old.close()
    store = Store.open(tmp_path)
    assert [(count.kind, count.votes) for count in store.feedback.count_by_day(2)] == [("thumb", 1)]
    learner = store.learner()
    assert (learner.listening, learner.request, learner.running) == (False, None, None)
    assert not store.round_requests.waits()
    with pytest.raises(Exception, match="No learner listens"):
        store.round_requests.ask()
    store.close()

"""Round requests: who listens, who takes them, and that none stays open forever."""

import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlite_utils
from prefloop.v1 import policy_pb2

from server.admin.backup import back_up
from server.store.learning.round_requests import OUTCOME_CHARACTERS
from server.store.migrations import migrations
from server.store.store import Store
from tests.server.conftest import Running
from tests.server.rpc.test_rpcs import ANN, BOB, chat, refusal
from tests.server.store.conftest import on_sqlite
from tests.server.store.test_store import answer

REFUSED = grpc.StatusCode.FAILED_PRECONDITION


def grow_old(store: Store, seconds: float) -> None:
    """Make the last heartbeats this much older."""
    store._db.execute("UPDATE listeners SET uptime = uptime - ?", [seconds])


async def ask(running: Running, user: Any = ANN) -> Any:
    return (await running.policies.RequestRound(policy_pb2.RequestRoundRequest(), metadata=user)).learner


async def look(running: Running) -> Any:
    return (await running.policies.GetLearner(policy_pb2.GetLearnerRequest(), metadata=ANN)).learner


async def refused(running: Running) -> tuple[list[str], str]:
    code, message, details = await refusal(running.policies.RequestRound(policy_pb2.RequestRoundRequest()))
    assert code == REFUSED
    return details, message


async def test_without_a_listening_learner_the_error_says_what_to_start(running: Running) -> None:
    nobody = (
        ["NO_LEARNER"],
        "No learner listens: start `learner schedule` on the server's data directory, with --on-request if rounds "
        "should only start on request.",
    )
    assert await refused(running) == nobody
    learner = await look(running)
    assert (learner.listening, learner.HasField("request_time"), learner.new_votes) == (False, False, 0)
    await running.store(lambda store: store.round_requests.listen("here", None))
    assert (await look(running)).listening
    # A learner killed half a minute ago no longer counts.
    await running.store(lambda store: grow_old(store, 31))
    assert await refused(running) == nobody
    assert not (await look(running)).listening
    await running.store(lambda store: store.round_requests.listen("here", None))
    await running.store(lambda store: store.round_requests.leave("here"))
    assert await refused(running) == nobody


async def test_a_request_is_asked_taken_and_closed(running: Running) -> None:
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
    # Requested again, by any user, before it starts.
    assert await ask(running, BOB) == waiting
    assert await running.store(lambda store: len(store._db.rows("SELECT 1 FROM round_requests"))) == 1
    request = await running.store(lambda store: store.round_requests.take("here"))
    assert request == 1
    assert await refused(running) == (["ROUND_RUNNING"], "A round is running; ask again when it is over.")
    assert await running.store(lambda store: store.round_requests.end(1, "here", "nothing to learn: so"))
    over = await look(running)
    assert over.outcome == "nothing to learn: so"
    assert over.end_time.ToMicroseconds() >= over.request_time.ToMicroseconds() == waiting.request_time.ToMicroseconds()
    # The next request is a new one.
    again = await ask(running)
    assert again.request_time.ToMicroseconds() > over.request_time.ToMicroseconds()
    assert (again.HasField("end_time"), again.outcome) == (False, "")
    [row] = await running.store(lambda store: store._db.rows("SELECT * FROM round_requests LIMIT 1"))
    columns = set(row)
    assert columns == {"id", "listener", "create_time", "end_time", "outcome"}


async def test_a_running_round_is_shown_and_blocks_requests(running: Running) -> None:
    def begin(store: Store) -> Any:
        store.round_requests.listen("here", None)
        fence = store.leases.acquire("learner", "by hand", 60)
        assert fence
        round_ = store.rounds.create(0, {}, reference_version="v0000", fence=fence)
        store.rounds.update(round_.id, stage="improve", fence=fence)
        return round_.id, fence

    round_id, fence = await running.store(begin)
    learner = await look(running)
    assert (learner.running_round_id, learner.stage) == (round_id, "improve")
    assert not learner.HasField("next_round_time")
    assert (await refused(running))[0] == ["ROUND_RUNNING"]
    # A stopped or killed round blocks no request, which resumes it.
    await running.store(lambda store: store.leases.release(fence))
    assert ((await look(running)).running_round_id, (await look(running)).stage) == ("", "")
    assert (await ask(running)).HasField("request_time")


def test_only_one_of_two_learners_takes_a_request(tmp_path: Path) -> None:
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


def test_a_request_of_a_learner_that_went_away_is_taken_again_and_closed_once(store: Store) -> None:
    requests = store.round_requests
    requests.listen("first", None)
    requests.ask()
    assert requests.take("first") == 1
    requests.listen("second", None)
    assert not requests.waits()
    assert requests.take("second") is None
    store._db.execute("UPDATE listeners SET uptime = uptime - 31 WHERE id = 'first'")
    assert requests.waits()
    # Requested again it is the same one, since it was not answered.
    assert requests.ask().end_time is None
    assert requests.take("second") == 1
    # The learner was only suspended.
    requests.listen("first", None)
    assert not requests.end(1, "first", "too late")
    assert requests.end(1, "second", "so")
    assert not requests.end(1, "second", "twice")
    last = requests.last()
    assert last
    assert last.outcome == "so"


def test_a_request_left_by_a_learner_waits_for_the_next(store: Store) -> None:
    requests = store.round_requests
    requests.listen("first", None)
    requests.ask()
    assert requests.take("first") == 1
    requests.leave("first")
    requests.listen("second", None)
    assert requests.take("second") == 1
    # Learners killed long ago are removed.
    grow_old(store, 3001)
    requests.listen("third", None)
    assert store._db.rows("SELECT id FROM listeners") == [{"id": "third"}]


def test_no_request_is_taken_while_a_learner_runs_a_round(store: Store) -> None:
    store.round_requests.listen("here", None)
    store.round_requests.ask()
    fence = store.leases.acquire("learner", "by hand", 60)
    assert fence
    assert (store.round_requests.waits(), store.round_requests.take("here")) == (False, None)
    # The request is still pending and the same.
    assert store.round_requests.ask().outcome == ""
    store.leases.release(fence)
    assert (store.round_requests.waits(), store.round_requests.take("here")) == (True, 1)


def test_a_long_outcome_is_truncated(store: Store) -> None:
    store.round_requests.listen("here", None)
    store.round_requests.ask()
    store.round_requests.take("here")
    store.round_requests.end(1, "here", "x" * 100_000)
    last = store.round_requests.last()
    assert last
    assert len(last.outcome) == OUTCOME_CHARACTERS == 2000


@on_sqlite
def test_a_backup_has_no_open_request(store: Store, tmp_path: Path) -> None:
    store.round_requests.listen("here", None)
    store.round_requests.ask()
    policies = tmp_path / "policies" / "v0000"
    policies.mkdir(parents=True)
    back_up(tmp_path, tmp_path / "backup")
    copy = Store.open(tmp_path / "backup")
    learner = copy.learner()
    assert learner.request
    assert (learner.listening, learner.request.outcome) == (False, "It was in progress when this backup was made.")
    assert not copy.round_requests.waits()
    copy.close()
    assert store.round_requests.waits()


@on_sqlite
def test_an_older_database_has_no_learner_and_counts_its_votes(tmp_path: Path) -> None:
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

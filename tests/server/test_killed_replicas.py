"""Three servers on one store, killed and restarted while people chat and vote: nothing that was said is lost."""

import random
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from server.shared.model.text import ChatText
from server.store.chats.records import Response
from server.store.store import Store
from tests.e2e.tiny import save_tiny_model
from tests.server.conftest import publish_version
from tests.server.replicas import ANSWER, Crowd, Servers, serve_model
from tests.tiers import slow

pytestmark = pytest.mark.parametrize("database", ["postgres"], indirect=True)
PEOPLE = 8


@pytest.fixture
def servers(data_dir: Path) -> Servers:
    publish_version(data_dir, "v0000")
    return Servers(data_dir)


@pytest.fixture
def data_dir(tmp_path: Path, database: str) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize(("kills", "votes", "streams"), [(3, 300, 100), slow(20, 5_000, 200)])
def test_what_was_acknowledged_by_servers_that_are_killed_is_there_once(
    servers: Servers, data_dir: Path, kills: int, votes: int, streams: int
) -> None:
    half = killed(servers, data_dir, kills, votes, streams)
    # What was said until then is kept, word by word.
    assert all(ANSWER.startswith(one.text) for one in half)
    assert all(len(one.text.split()) == len(one.token_ids) for one in half)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_with_a_real_model(data_dir: Path) -> None:
    save_tiny_model(data_dir.with_name("model"))
    half = killed(Servers(data_dir, serve_model), data_dir, kills=20, votes=5_000, streams=200)
    text = ChatText.load(data_dir / "policies" / "v0000")
    assert all(text.text(one.token_ids).startswith(one.text) for one in half)


def killed(servers: Servers, data_dir: Path, kills: int, votes: int, streams: int) -> list[Response]:
    """Kill servers while people chat and vote, and check what they were told. Returns the answers that broke."""
    crowd, draw = Crowd(), random.Random(7)
    with servers.running(), crowd.chatting(servers.ports, PEOPLE):
        for kill in range(1, kills + 1):
            crowd.wait(lambda crowd, least=votes * kill / (kills + 1): crowd.acknowledged >= least, seconds=300)
            port = draw.choice(servers.ports)
            servers.kill(port)
            servers.start(port)
        crowd.wait(lambda crowd: crowd.acknowledged >= votes and len(crowd.answers) >= streams, seconds=300)
    with closing(Store.open(data_dir)) as store:
        for number in range(PEOPLE):
            user = f"user{number}"
            stored = {vote.id: vote.value for vote in store.feedback.page(user, 1_000_000)}
            mine = {vote for vote in crowd.votes if vote in stored}
            # Each once, with the value that was acknowledged last; the very last may be stored without an answer.
            assert sum(stored[vote] != crowd.votes[vote] for vote in mine) <= 1
            for conversation in store.conversations.page(user):
                for turn in store.conversations.turns(user, conversation.id):
                    assert turn.response
                    assert turn.message == "hello there"
                    if turn.response.id in crowd.answers:
                        assert turn.response.text == crowd.answers[turn.response.id]
                        assert turn.response.status == "finished"
        known = {vote.id for number in range(PEOPLE) for vote in store.feedback.page(f"user{number}", 1_000_000)}
        events = store._db.rows("SELECT count(*) AS n FROM feedback_events")[0]["n"]
        broken = [store.responses.get(user_of(store, one), one) for one in crowd.broken]
    assert crowd.votes.keys() <= known
    # A vote that was repeated after a kill is one event; nobody's last one may have been acknowledged.
    assert 0 <= events - crowd.acknowledged <= PEOPLE
    assert set(crowd.broken.values()) <= {grpc.StatusCode.UNAVAILABLE}
    assert broken, "no kill broke a stream"
    # The server that came back has closed them; one was whole, if the kill came before its last word was sent.
    assert {one.status for one in broken} <= {"failed", "finished"}
    half = [one for one in broken if one.status == "failed" and one.text]
    assert half, "no broken answer was kept"
    assert all(len(one.token_ids) == one.spans[-1].end for one in half)
    return half


def test_servers_are_restarted_one_after_another_without_breaking_a_stream(servers: Servers) -> None:
    crowd = Crowd()
    with servers.running(), crowd.chatting(servers.ports, PEOPLE):
        for port in servers.ports:
            before = len(crowd.answers)
            crowd.wait(lambda crowd, least=before + 20: len(crowd.answers) >= least, seconds=60)
            servers.stop(port)
            servers.start(port)
        before = len(crowd.answers)
        crowd.wait(lambda crowd: len(crowd.answers) >= before + 20, seconds=60)
    assert crowd.broken == {}
    assert set(crowd.answers.values()) == {ANSWER}


def user_of(store: Store, response_id: str) -> str:
    return str(store._db.rows("SELECT user FROM responses WHERE id = ?", [response_id])[0]["user"])

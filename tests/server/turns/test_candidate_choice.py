"""Which second answer a comparison shows, over real gRPC on both sides, with scores given here."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from prefloop.v1 import chat_pb2, scoring_pb2, scoring_pb2_grpc
from pydantic import ValidationError

from server.rpc.scoring_client import ScoringClient
from server.settings import ServerSettings
from server.store.store import Store
from server.turns.candidate_choice import CandidateChooser, Chosen, dispute
from tests.server.conftest import Running, running_server
from tests.server.rpc.test_rpcs import ANN, chat, compare, failure

# The scores by two members for an answer's number of tokens. Compared with "one" (0, 0) they agree that two words are
# better and four are worse; on three they disagree.
OPINIONS = {1: [0.0, 0.0], 2: [3.0, 3.0], 3: [-2.0, 2.0], 4: [-3.0, -3.0]}


class Opinions(scoring_pb2_grpc.ScoringServiceServicer):
    """Returns the scores in OPINIONS, or those that a test sets."""

    def __init__(self) -> None:
        self.asked: list[scoring_pb2.ScoreCandidatesRequest] = []
        self.asking = asyncio.Event()
        self.holds = False
        self.refusal = ""
        self.forgets = 0

    async def ScoreCandidates(
        self, request: scoring_pb2.ScoreCandidatesRequest, context: Any
    ) -> scoring_pb2.ScoreCandidatesResponse:
        self.asked.append(request)
        self.asking.set()
        if self.refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        if self.holds:
            await asyncio.Event().wait()
        scores = [scoring_pb2.CandidateScore(member_scores=OPINIONS[len(one.token_ids)]) for one in request.candidates]
        return scoring_pb2.ScoreCandidatesResponse(
            reward_model_version="rm0007", scores=scores[: len(scores) - self.forgets]
        )


async def ours(reward_model_version: str) -> bool:
    return True


@asynccontextmanager
async def opinions() -> AsyncIterator[tuple[Opinions, str]]:
    service, server = Opinions(), grpc.aio.server()
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield service, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def fitted_for(reference: str) -> Any:
    def register(store: Store) -> None:
        store.reward_models.register("rm0007", reference_version=reference, round_id=None, metrics={})

    return register


@asynccontextmanager
async def planning(tmp_path: Path, seconds: float = 30.0) -> AsyncIterator[tuple[Running, Opinions]]:
    async with (
        opinions() as (service, address),
        running_server(tmp_path, scoring_address=address, scoring_seconds=seconds) as running,
    ):
        await running.store(fitted_for("v0000"))
        running.engine.answers = ["one", "one two", "one two three", "one two three four"]
        yield running, service


def shown(events: list[Any]) -> set[str]:
    return {event.finished.text for event in events if event.WhichOneof("event") == "finished"}


async def stored(running: Running, query: str) -> list[Any]:
    return await running.store(lambda store: list(store._db.rows(query)))


async def answers(running: Running) -> dict[str, str | None]:
    """The responses in the store, and which reward model chose them."""
    return {row["text"]: row["chosen_by"] for row in await stored(running, "SELECT text, chosen_by FROM responses")}


async def test_the_answer_that_the_members_dispute_most_is_shown_beside_the_first(tmp_path: Path) -> None:
    async with planning(tmp_path) as (running, service):
        events = await compare(running)
        assert shown(events) == {"one ", "one two three "}
        assert await answers(running) == {"one ": None, "one two three ": "rm0007"}
        [asked] = service.asked
        assert list(asked.prompt_token_ids) == running.engine.prompts[0]
        assert [len(one.token_ids) for one in asked.candidates] == [1, 2, 3, 4]
        # One answer at either of Compare's temperatures, and two more to choose among at the second one's.
        first, *others = [sampling.temperature for sampling in running.engine.samplings]
        assert (first, others) in [(0.7, [1.0, 1.0, 1.0]), (1.0, [0.7, 0.7, 0.7])]


async def test_either_slot_is_streamed_first(tmp_path: Path) -> None:
    async with planning(tmp_path) as (running, service):
        slots = set()
        for _ in range(30):
            running.engine.answers = ["one", "one two", "one two three", "one two three four"]
            events = await compare(running)
            slots |= {event.finished.slot for event in events if event.finished.text == "one "}
        # The same slot 30 times happens once in 5e8 runs.
        assert slots == {chat_pb2.SLOT_A, chat_pb2.SLOT_B}
        assert len(service.asked) == 30


async def test_without_scores_any_answer_is_shown_and_the_log_says_why_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with planning(tmp_path) as (running, service):
        for service.refusal, service.forgets in (("no reward model", 0), ("no reward model", 0), ("", 1), ("", 0)):
            running.engine.answers = ["one", "one two", "one two three", "one two three four"]
            chosen = "one two three " if (service.refusal, service.forgets) == ("", 0) else "one two "
            assert shown(await compare(running)) == {"one ", chosen}
        assert len(service.asked) == 4
    said = [record.getMessage() for record in caplog.records if record.name == "server.turns.candidate_choice"]
    assert said == [
        "comparisons: no scores: FAILED_PRECONDITION no reward model",
        "comparisons: no scores: invalid response: 3 scores for 4 answers",
        "comparisons: scores are available again",
    ]


async def test_late_scores_are_not_waited_for(tmp_path: Path) -> None:
    async with planning(tmp_path, seconds=0.5) as (running, service), asyncio.timeout(20):
        service.holds = True
        assert shown(await compare(running)) == {"one ", "one two "}
        assert len(service.asked) == 1
        assert await answers(running) == {"one ": None, "one two ": None}


async def test_a_score_server_that_is_down_is_not_waited_for() -> None:
    chooser = CandidateChooser(ScoringClient("127.0.0.1:1", 300.0), ours)
    async with asyncio.timeout(20):
        assert await chooser.choose([1], [2], [[3], [4]]) == Chosen(0, None)
    await chooser.close()


async def test_user_messages_go_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with opinions() as (service, address):
        chooser = CandidateChooser(ScoringClient(address, 30.0), ours)
        assert await chooser.choose([5], [1], [[1, 2], [1, 2, 3]]) == Chosen(1, "rm0007")
        await chooser.close()
        assert len(service.asked) == 1


async def test_a_request_with_a_seed_is_repeatable_and_not_chosen_by_scores(tmp_path: Path) -> None:
    async with planning(tmp_path) as (running, service):
        await compare(running, sampling=chat_pb2.SamplingOptions(seed=5))
        assert [sampling.seed for sampling in running.engine.samplings] == [5, 6]
        assert service.asked == []


@pytest.mark.parametrize("while_", ["sampled", "scored"])
async def test_a_caller_that_leaves_leaves_nothing_running_or_open(tmp_path: Path, while_: str) -> None:
    async with planning(tmp_path) as (running, service):
        if while_ == "sampled":
            running.engine.hold_after = 1
            running.engine.answers = ["one two"] * 4
        service.holds = True
        call = running.chat.Compare(chat_pb2.CompareRequest(message="hello"), metadata=ANN)
        conversation_id = (await call.read()).started.conversation_id
        if while_ == "scored":
            await service.asking.wait()
        async with asyncio.timeout(10):
            while while_ == "sampled" and running.engine.held < 4:
                await asyncio.sleep(0)
        call.cancel()
        running.engine.hold_after = None
        # Waits for the previous turn to end.
        await chat(running, "go on", conversation_id=conversation_id)
        assert (len(running.engine.samplings), running.engine.finished) == (5, 5)
        rows = await stored(running, "SELECT text, status FROM responses ORDER BY create_time LIMIT 2")
        streamed = ("one ", "cancelled") if while_ == "sampled" else ("one ", "finished")
        assert {(row["text"], row["status"]) for row in rows} == {streamed, ("", "cancelled")}
        # The model continues from the answer that was streamed, whichever slot it has.
        assert {"role": "assistant", "content": "one "} in running.engine.encoded[-1]


async def test_an_engine_that_dies_ends_the_comparison(tmp_path: Path) -> None:
    async with planning(tmp_path) as (running, _):
        running.engine.dies = True
        request = chat_pb2.CompareRequest(message="hello")
        assert await failure(running.chat.Compare(request, metadata=ANN)) == grpc.StatusCode.UNAVAILABLE
        await running.app.stop(0)
        rows = await stored(running, "SELECT status FROM responses ORDER BY status")
        assert [row["status"] for row in rows] == ["failed", "failed"]


def test_members_that_agree_dispute_nothing() -> None:
    assert dispute([0.0, 0.0], [3.0, 3.0]) == 0.0
    # sigmoid(2) = 0.8808 and sigmoid(-2) = 0.1192: each 0.3808 from their mean.
    assert dispute([0.0, 0.0], [-2.0, 2.0]) == pytest.approx(0.14500, abs=1e-5)
    assert dispute([800.0, 0.0], [0.0, 800.0]) == pytest.approx(0.25)


@pytest.mark.parametrize("address", ["scores.example:50052", "10.0.0.1:50052", "127.0.0.1", "localhost:", ":50052"])
def test_scores_are_only_requested_on_loopback(address: str) -> None:
    with pytest.raises(ValidationError, match="must be host:port with a host on loopback"):
        ServerSettings.load(scoring_address=address)
    assert ServerSettings.load(scoring_address="[::1]:50052").scoring_address == "[::1]:50052"


async def test_a_reward_model_of_another_model_chooses_nothing(tmp_path: Path) -> None:
    async with planning(tmp_path) as (running, service):
        await running.store(lambda store: store._db.execute("UPDATE reward_models SET reference_version = 'v0002'"))  # type: ignore[attr-defined]
        await compare(running)
        assert set((await answers(running)).values()) == {None}
        assert len(service.asked) == 1

"""Samples before and after a round over gRPC: only complete ones, of existing conversations and known rounds."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prefloop.v1 import account_pb2, chat_pb2, policy_pb2

from server.admin import retention_task
from server.rpc.services import policies
from server.store.files.residue import keeping
from server.store.files.round_samples import RoundSample, read_samples
from server.store.learning.records import Round
from server.store.learning.round_metrics import RoundMetrics
from server.store.store import Store
from tests.round_metrics import candidate_metrics, gate_metrics
from tests.server.conftest import Running, running_server
from tests.server.rpc.test_rpcs import ANN, BOB, refusal

OWN = ""


def judged(store: Store) -> Round:
    """A round whose gate chose the candidate of step 2."""
    fence = store.leases.acquire("learner", "here", 60)
    assert fence
    round_ = store.rounds.create(0, {}, reference_version="v0000", fence=fence)
    metrics = RoundMetrics(gate=gate_metrics(candidate_metrics(2)))
    round_ = store.rounds.update(round_.id, stage="gate", metrics=metrics, fence=fence)
    store.leases.release(fence)
    return round_


def keep_line(data_dir: Path, round_: Round, conversation_id: str, prompt: str = "why", **more: Any) -> None:
    """As the gate writes it."""
    answers = {name: {"text": name} for name in ("reference", "incumbent", "step 1", "step 2")}
    line = {"conversation_id": conversation_id, **more, "prompt": prompt, "prompt_token_ids": [1], **answers}
    directory = data_dir / "rounds" / round_.id
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "answers.jsonl").open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


async def listed(running: Running, round_: Round, size: int = 0, token: str = "") -> Any:
    request = policy_pb2.ListRoundSamplesRequest(round_id=round_.id, page_size=size, page_token=token)
    return await running.policies.ListRoundSamples(request, metadata=ANN, timeout=10)


def prompts(response: Any) -> list[str]:
    return [sample.prompt for sample in response.samples]


async def test_samples_are_listed_page_by_page(running: Running) -> None:
    round_ = await running.store(judged)
    assert prompts(await listed(running, round_)) == []
    for number in range(5):
        # A line end to Python's text files, but not in JSON.
        keep_line(running.data_dir, round_, OWN, f"p{number}\u2028!", row=number)
    first = await listed(running, round_, 2)
    assert [(one.prompt, one.before, one.after) for one in first.samples] == [
        ("p0\u2028!", "incumbent", "step 2"),
        ("p1\u2028!", "incumbent", "step 2"),
    ]
    second = await listed(running, round_, 2, first.next_page_token)
    third = await listed(running, round_, 2, second.next_page_token)
    assert prompts(second) + prompts(third) == ["p2\u2028!", "p3\u2028!", "p4\u2028!"]
    assert third.next_page_token == ""
    assert prompts(await listed(running, round_, 5)) == prompts(await listed(running, round_))


async def test_a_round_that_judged_nothing_has_no_samples(running: Running) -> None:
    round_ = await running.store(judged)
    keep_line(running.data_dir, round_, OWN)
    # A round that was killed while it wrote them.
    await running.store(lambda store: store._db.execute("UPDATE rounds SET metrics = '{}'"))
    assert prompts(await listed(running, round_)) == []


def test_truncated_lines_and_lines_without_a_conversation_are_left_out(store: Store, tmp_path: Path) -> None:
    round_ = judged(store)
    file = tmp_path / "rounds" / round_.id / "answers.jsonl"
    keep_line(tmp_path, round_, OWN, "whole")
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"conversation_id": "", ', b"") + whole + whole[:-1])
    assert list(read_samples(tmp_path, round_)) == [RoundSample(1, "", "whole", "incumbent", "step 2")]


@pytest.fixture
async def unswept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    """A server that does not sweep."""
    monkeypatch.setattr(retention_task, "erase", lambda *arguments, **options: True)
    async with running_server(tmp_path) as running:
        yield running


async def test_deleted_conversations_are_hidden_even_before_a_sweep(unswept: Running) -> None:
    gone, kept = await unswept.store(lambda store: [store.conversations.create("ann", "q") for _ in range(2)])
    round_ = await unswept.store(judged)
    for conversation_id, prompt in ((gone, "secret"), (kept, "kept"), (OWN, "ours"), (kept, "more")):
        keep_line(unswept.data_dir, round_, conversation_id, prompt)
    first = await listed(unswept, round_, 1)
    assert prompts(first) == ["secret"]
    # The rows are deleted and the sweep waits for the lock.
    await unswept.store(lambda store: store.conversations.delete("ann", gone))
    assert b"secret" in (unswept.data_dir / "rounds" / round_.id / "answers.jsonl").read_bytes()
    assert prompts(await listed(unswept, round_)) == ["kept", "ours", "more"]


async def test_a_next_page_continues_correctly_after_a_sweep(running: Running) -> None:
    gone, kept = await running.store(lambda store: [store.conversations.create("ann", "q") for _ in range(2)])
    round_ = await running.store(judged)
    for row, (conversation_id, prompt) in enumerate(((gone, "a"), (kept, "b"), (kept, "c"), (kept, "d"))):
        keep_line(running.data_dir, round_, conversation_id, prompt, row=row)
    first = await listed(running, round_, 2)
    request = chat_pb2.DeleteConversationRequest(conversation_id=gone)
    await running.chat.DeleteConversation(request, metadata=ANN)
    assert b'"a"' not in (running.data_dir / "rounds" / round_.id / "answers.jsonl").read_bytes()
    assert prompts(await listed(running, round_, 2, first.next_page_token)) == ["c", "d"]


async def test_a_deletion_while_samples_are_read_takes_effect(unswept: Running, monkeypatch: Any) -> None:
    conversation_id = await unswept.store(lambda store: store.conversations.create("ann", "q"))
    round_ = await unswept.store(judged)
    keep_line(unswept.data_dir, round_, conversation_id, "secret")
    loop = asyncio.get_running_loop()

    def delete_and_read(data_dir: Path, round_: Round) -> Any:
        found = list(read_samples(data_dir, round_))
        assert len(found) == 1
        deleted = unswept.store(lambda store: store.conversations.delete("ann", conversation_id))
        asyncio.run_coroutine_threadsafe(deleted, loop).result(10)
        return found

    monkeypatch.setattr(policies, "read_samples", delete_and_read)
    assert prompts(await listed(unswept, round_)) == []


async def test_samples_wait_for_a_sweep_without_blocking_other_calls(running: Running) -> None:
    round_ = await running.store(judged)
    with keeping(running.data_dir):
        listing = asyncio.create_task(listed(running, round_))
        # Sent later but answered earlier: the event loop is free.
        for _ in range(3):
            await running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=ANN, timeout=10)
        assert not listing.done()
        keep_line(running.data_dir, round_, OWN, "written meanwhile")
    assert prompts(await listing) == ["written meanwhile"]


async def test_a_page_is_never_larger_than_a_client_accepts(running: Running) -> None:
    round_ = await running.store(judged)
    for letter in "abc":
        keep_line(running.data_dir, round_, OWN, letter * 1_500_000)
    found, token = [], ""
    while True:
        page = await listed(running, round_, 200, token)
        found.append([prompt[0] for prompt in prompts(page)])
        if not (token := page.next_page_token):
            break
    assert found == [["a"], ["b"], ["c"]]


async def test_an_unknown_round_is_not_found_whatever_is_on_disk(running: Running) -> None:
    round_ = await running.store(judged)
    keep_line(running.data_dir, round_, OWN, "of a round")
    (running.data_dir / "elsewhere").mkdir()
    (running.data_dir / "rounds" / round_.id / "answers.jsonl").rename(running.data_dir / "elsewhere/answers.jsonl")
    for name in ("round_none", "../elsewhere", f"{round_.id}/../../elsewhere", "/", ".", round_.id.upper(), "\x00"):
        request = policy_pb2.ListRoundSamplesRequest(round_id=name)
        code, _, details = await refusal(running.policies.ListRoundSamples(request, metadata=ANN))
        assert (code, details) == (grpc.StatusCode.NOT_FOUND, ["NOT_FOUND"]), name


async def test_nothing_is_shown_of_a_deleted_user(running: Running) -> None:
    hers, his = await running.store(lambda store: [store.conversations.create(user, "q") for user in ("ann", "bob")])
    round_ = await running.store(judged)
    for conversation_id, prompt in ((hers, "hers"), (his, "his")):
        keep_line(running.data_dir, round_, conversation_id, prompt)
    await running.account.ForgetUser(account_pb2.ForgetUserRequest(user="ann"), metadata=BOB, timeout=10)
    assert prompts(await listed(running, round_)) == ["his"]
    assert b"hers" not in (running.data_dir / "rounds" / round_.id / "answers.jsonl").read_bytes()

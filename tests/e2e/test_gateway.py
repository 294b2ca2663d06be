"""OpenAI's client, the gateway as `chat gateway` runs it, and the real engine."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import openai
import pytest
from prefloop.v1 import chat_pb2

from server.store.store import Store
from tests.e2e.conftest import LiveServer
from tests.e2e.test_swap import LONG, activate, roll_words
from tests.versions import make_version

pytestmark = pytest.mark.e2e
GWEN = "gwen"


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    """A client of a gateway whose user on the server, which has no keys, is GWEN."""
    host, _, port = live.address.rpartition(":")
    command = [sys.executable, "-m", "clients.cli", "--host", host, "--port", port, "--user", GWEN]
    process = subprocess.Popen([*command, "gateway", "--web-port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = process.stdout.readline().removeprefix("gateway on ").strip()
        yield openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=120)
    finally:
        process.terminate()
        process.wait(30)


def ask(client: openai.OpenAI, *texts: str, **fields: object) -> openai.types.chat.ChatCompletion:
    said = [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]
    answer: openai.types.chat.ChatCompletion = client.chat.completions.create(
        model="prefloop",
        messages=said,
        max_tokens=12,
        **fields,  # type: ignore[call-overload, arg-type]
    )
    return answer


def test_a_conversation_of_a_stateless_client_is_one_here(live: LiveServer, client: openai.OpenAI) -> None:
    first = ask(client, "Name a colour.", temperature=0)
    text = first.choices[0].message.content or ""
    second = ask(client, "Name a colour.", text, "Another one.", temperature=0, stop=["\n"])
    again = ask(client, "Name a colour.", text, "Another one.")
    two = ask(client, "Name a colour.", text, "Another one.", n=2)
    client.post("/feedback", body={"id": second.id, "other_id": again.id, "value": "b"}, cast_to=object)
    client.post("/feedback", body={"id": two.id, "value": "a"}, cast_to=object)
    metadata = (("x-user-id", GWEN),)
    [listed] = live.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=metadata).conversations
    request = chat_pb2.GetConversationRequest(conversation_id=listed.conversation_id)
    turns = live.chat.GetConversation(request, metadata=metadata).conversation.turns
    assert [turn.message for turn in turns] == ["Name a colour.", *["Another one."] * 3]
    assert [turn.response.response_id for turn in turns[:3]] == [first.id, second.id, again.id]
    assert turns[3].comparison.comparison_id == two.id
    # All answers to the second message were sampled after the same tokens.
    with closing(Store.open(live.data_dir)) as store:
        prompts = [store.responses.get(GWEN, one.id).prompt_token_ids for one in (second, again)]
        assert prompts[0] == prompts[1]
        votes = store.snapshots.take().choices
        assert [(vote.choice, vote.a.prompt_token_ids) for vote in votes if vote.user == GWEN] == [
            ("B", prompts[0]), ("A", prompts[0]),
        ]  # fmt: skip


def test_a_client_that_leaves_stops_the_engine_and_a_swap_is_named(live: LiveServer, client: openai.OpenAI) -> None:
    version = make_version(live.data_dir, roll_words)
    said: list[dict[str, str]] = [{"role": "user", "content": LONG}]
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="prefloop", messages=said, stream=True, max_tokens=400
    )
    seen = []
    try:
        for chunk in stream:
            seen.append(chunk)
            if len(seen) == 5:
                activate(live, version)
        assert seen[0].system_fingerprint == "v0000"
        assert seen[-1].system_fingerprint == f"v0000+{version}"
        assert seen[-1].model == f"prefloop@{version}"
    finally:
        activate(live, "v0000")
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="prefloop", messages=said, stream=True, max_tokens=400
    )
    left = next(iter(stream)).id
    stream.close()
    # The next answer to these messages does not wait for it; when it has ended, so has the other.
    with closing(Store.open(live.data_dir)) as store:
        for _ in range(20):
            ask(client, LONG)
            if (response := store.responses.get(GWEN, left)).finish_reason:
                break
        assert (response.finish_reason, len(response.token_ids) < 400) == ("cancelled", True)

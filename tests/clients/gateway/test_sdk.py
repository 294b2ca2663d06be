"""OpenAI's own Python client against the gateway."""

import openai
import pytest

from tests.clients.gateway.conftest import SAID, SECONDS, Gateway


@pytest.fixture
def client(gateway: Gateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", timeout=SECONDS, max_retries=0)


async def test_it_answers_streams_and_lists(client: openai.AsyncOpenAI) -> None:
    found = await client.chat.completions.create(model="prefloop", messages=SAID)  # type: ignore[arg-type]
    assert found.choices[0].message.content == "one two three four "
    assert found.usage is not None
    assert found.usage.total_tokens == 6
    stream = await client.chat.completions.create(
        model="prefloop",
        messages=SAID,  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three four "
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [4]
    assert [model.id async for model in client.models.list()] == ["prefloop", "prefloop@v0000"]


async def test_it_reads_refusals(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model="prefloop",
            messages=[{"role": "user", "content": "a " * 21}],
        )
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model="prefloop", input="hello")
    engine = gateway.running.engine
    engine.dies = True
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="prefloop", messages=SAID)  # type: ignore[arg-type]


async def test_it_raises_what_ends_a_stream(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    engine = gateway.running.engine
    engine.hold_after = 2
    stream = await client.chat.completions.create(model="prefloop", messages=SAID, stream=True)  # type: ignore[arg-type]
    await engine.holding.wait()
    engine.dies = True
    engine.go_on.set()
    with pytest.raises(openai.APIError, match=r"The engine stopped\."):
        async for _ in stream:
            pass


async def test_feedback_goes_through_the_same_client(client: openai.AsyncOpenAI) -> None:
    found = await client.chat.completions.create(model="prefloop", messages=SAID, n=2)  # type: ignore[arg-type]
    response = await client.post("/feedback", body={"id": found.id, "value": "b"}, cast_to=object)
    assert response["data"][0]["value"] == "b"  # type: ignore[index]

"""/v1/chat/completions over real HTTP: answers, streams, comparisons, refusals, cancellation."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.store.chats.records import Response
from tests.clients.gateway.conftest import SAID, SECONDS, Gateway, error, serving_gateway
from tests.server.conftest import publish_version, register, running_server

ANSWER = "one two three four "


async def stored(gateway: Gateway, response_id: str, user: str = "ann") -> Response:
    return await gateway.running.store(lambda store: store.responses.get(user, response_id))


async def test_an_answer(gateway: Gateway) -> None:
    response = await gateway.complete(temperature=0.5, max_tokens=7, seed=3, stop="five")
    found = response.json()
    assert abs(found.pop("created") - time.time()) < SECONDS
    response_id = found.pop("id")
    assert found == {
        "object": "chat.completion",
        "model": "prefloop@v0000",
        "system_fingerprint": "v0000",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6},
    }
    kept = await stored(gateway, response_id)
    assert (kept.text, kept.temperature, kept.max_tokens, kept.seed, kept.stop) == (ANSWER, 0.5, 7, 3, ("five",))


async def test_a_stream(gateway: Gateway) -> None:
    found = await gateway.chunks(stream_options={"include_usage": True})
    assert found.pop() == "[DONE]"
    [identifier] = {chunk.pop("id") for chunk in found}
    assert identifier.startswith("resp_")
    assert len({chunk.pop("created") for chunk in found}) == 1
    *parts, last = found
    same = {
        "object": "chat.completion.chunk", "model": "prefloop@v0000", "system_fingerprint": "v0000", "usage": None,
    }  # fmt: skip
    deltas: list[Any] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word + " "} for word in ANSWER.split()]
    assert parts == [
        *({**same, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}
          for delta in deltas),
        {**same, "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]},
    ]  # fmt: skip
    assert last == {
        **same, "choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6},
    }  # fmt: skip
    # Without the option no chunk has a usage.
    assert all("usage" not in chunk for chunk in (await gateway.chunks())[:-1])


async def test_an_answer_at_the_length_limit(gateway: Gateway) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        [choice] = (await gateway.complete(**{name: 2})).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("one two ", "length")


async def test_two_answers_are_a_blind_comparison(gateway: Gateway) -> None:
    gateway.running.engine.answers = ["left", "right"]
    found = (await gateway.complete(n=2)).json()
    assert found["id"].startswith("cmp_")
    assert (found["model"], found["system_fingerprint"]) == ("prefloop", None)
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    compared = await gateway.running.store(lambda store: store.responses.comparison("ann", found["id"]))
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert texts == [compared.a.text, compared.b.text]
    assert sorted(texts) == ["left ", "right "]
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


async def test_two_answers_stream_side_by_side(gateway: Gateway) -> None:
    gateway.running.engine.answers = ["l e f t", "r i g h t"]
    *found, done = await gateway.chunks(n=2)
    assert done == "[DONE]"
    assert {(chunk["model"], chunk["system_fingerprint"]) for chunk in found} == {("prefloop", None)}
    texts = {0: "", 1: ""}
    for chunk in found:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert sorted(texts.values()) == ["l e f t ", "r i g h t "]
    assert [chunk["choices"][0]["delta"] for chunk in found[:2]] == [{"role": "assistant", "content": ""}] * 2
    ended = [chunk["choices"][0]["index"] for chunk in found if chunk["choices"][0]["finish_reason"] == "stop"]
    assert sorted(ended) == [0, 1]


async def test_the_last_chunk_names_all_versions(gateway: Gateway) -> None:
    engine = gateway.running.engine
    engine.hold_after = 2
    streaming = asyncio.create_task(gateway.chunks())
    await asyncio.wait_for(engine.holding.wait(), SECONDS)
    engine.version = "v0001"
    engine.go_on.set()
    *found, last, _ = await streaming
    assert {chunk["system_fingerprint"] for chunk in found} == {"v0000"}
    assert (last["model"], last["system_fingerprint"]) == ("prefloop@v0001", "v0000+v0001")


async def test_a_model_names_a_live_version(gateway: Gateway) -> None:
    running = gateway.running
    publish_version(running.data_dir, "v0001")
    await running.store(lambda store: register(store, "v0001"))
    running.engine.live = {"v0001"}
    listed = (await gateway.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [(one["id"], one["object"], one["owned_by"]) for one in listed["data"]] == [
        (name, "model", "prefloop") for name in ("prefloop", "prefloop@v0000", "prefloop@v0001")
    ]
    assert all(abs(one["created"] - time.time()) < SECONDS for one in listed["data"])
    assert (await gateway.http.get("/v1/models/prefloop@v0001")).json() == listed["data"][2]
    assert error(await gateway.http.get("/v1/models/gpt"))[0] == 404
    assert (await gateway.complete(model="prefloop@v0001")).json()["model"] == "prefloop@v0001"
    assert running.engine.pinned == ["v0001"]
    assert error(await gateway.complete(model="prefloop@v0007")) == (
        404, "There is no live version 'v0007'.", "model", "model_not_found",
    )  # fmt: skip
    for name in ("gpt-4o", "prefloop@", "prefloop2"):
        assert error(await gateway.complete(model=name)) == (
            404, f"There is no model {name!r}; 'prefloop' is served.", "model", "model_not_found",
        )  # fmt: skip


async def test_the_history_is_the_callers(gateway: Gateway) -> None:
    said = [
        {"role": "system", "content": "be kind"},
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "assistant", "content": "Welcome!"},
        {"role": "user", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "there"}]},
    ]
    first = (await gateway.complete(messages=said)).json()
    assert gateway.running.engine.encoded[-1] == [
        {"role": "system", "content": "be kind\n\nbe brief"},
        {"role": "assistant", "content": "Welcome!"},
        {"role": "user", "content": "hello\n\nthere"},
    ]
    # What a client sends back, with all the fields that it got.
    answer = first["choices"][0]["message"] | {"tool_calls": [], "annotations": [], "audio": None}
    second = (await gateway.complete(messages=[*said, answer, {"role": "user", "content": "more"}])).json()
    conversations = {(await stored(gateway, one["id"])).conversation_id for one in (first, second)}
    assert len(conversations) == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": []}, (400, "messages: List should have at least 1 item after validation, not 0.", "messages",
                            None)),
        ({"messages": [{"role": "user"}]},
         (400, "messages must each be valid: content must not be empty.", "messages", "invalid_field")),
        ({"messages": [*SAID, {"role": "assistant", "content": "hi"}]},
         (400, "messages must end with the user's message.", "messages", "invalid_field")),
        ({"messages": [*SAID, {"role": "system", "content": "late"}]},
         (400, "messages[1] is a system prompt after other messages; it is served only at the beginning.",
          "messages[1]", "unsupported_value")),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
         (400, "messages[0].role 'tool' is not served.", "messages[0].role", "unsupported_value")),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         (400, "messages[0].content has a part of the type 'image_url'; only text is served.", "messages[0].content",
          "unsupported_value")),
        ({"messages": [{"role": "user", "content": "hi", "name": "zoe"}]},
         (400, "messages[0].name is not served.", "messages[0].name", "unsupported_parameter")),
        ({"messages": [{"role": "user", "content": 3}]},
         (400, "messages[0].content: Input should be a valid string.", "messages[0].content", None)),
        ({"messages": "hello"}, (400, "messages: Input should be a valid list.", "messages", None)),
        ({"n": 3}, (400, "n: Input should be less than or equal to 2.", "n", None)),
        ({"n": True}, (400, "n: Input should be a valid integer.", "n", None)),
        ({"n": 2, "temperature": 1}, (400, "With n = 2 the answers are a comparison: the server sets both "
                                      "temperatures.", "temperature", "unsupported_value")),
        ({"n": 2, "model": "prefloop@v0000"}, (400, "With n = 2 the answers are a comparison, which is blind: the "
                                               "model must be 'prefloop'.", "model", "unsupported_value")),
        ({"temperature": 2.5}, (400, "temperature must be 0 to 2, not 2.5.", "temperature", "invalid_field")),
        ({"max_tokens": 21}, (400, "max_tokens must be 1 to 20, not 21.", "max_tokens", "invalid_field")),
        ({"max_tokens": -1}, (400, "max_tokens: Input should be greater than or equal to 0.", "max_tokens", None)),
        ({"max_tokens": 2**70}, (400, "max_tokens: Input should be less than or equal to 4294967295.", "max_tokens",
                                 None)),
        ({"seed": -1}, (400, "seed: Input should be greater than or equal to 0.", "seed", None)),
        ({"max_tokens": 3, "max_completion_tokens": 4},
         (400, "max_tokens and max_completion_tokens are two names of one thing, but differ.",
          "max_completion_tokens", None)),
        ({"stop": ["1", "2", "3", "4", "5"]},
         (400, "stop must be at most 4 sequences, not 5.", "stop", "invalid_field")),
        ({"messages": [{"role": "user", "content": "a " * 21}]},
         (400, "A prompt of 21 tokens is longer than the model's context length; at most 20 fit with an answer.",
          "messages", "context_length_exceeded")),
        ({"model": None}, (400, "model: Field required.", "model", None)),
        ({"user": "two words"}, (400, "An end user's name is 1 to 64 printable ASCII characters without spaces.",
                                 "user", "invalid_field")),
        ({"user": "zoë"}, (400, "user must be printable ASCII characters.", "user", None)),
    ],
)  # fmt: skip
async def test_what_is_invalid_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], expected: Any) -> None:
    body = {"model": "prefloop", "messages": SAID, **fields}
    for stream in (False, True):
        assert error(await gateway.post("/v1/chat/completions", {**body, "stream": stream})) == expected


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "null", '{"a": NaN}', "[" * 100_000, '"\xff"', '{"a": "\\ud800"}', '{"a": "\xed\xa0\x80"}']
)
async def test_a_body_that_is_no_object(gateway: Gateway, body: str) -> None:
    response = await gateway.http.post(
        "/v1/chat/completions", content=body.encode("latin-1"), headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert error(response)[1] in ("The body is not valid JSON.", "The body must be a JSON object.")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_leaves_cancels_its_answer(gateway: Gateway, stream: bool) -> None:
    engine = gateway.running.engine
    engine.hold_after = 2
    asking = asyncio.create_task(gateway.complete(stream=stream))
    await asyncio.wait_for(engine.holding.wait(), SECONDS)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking

    async def reason() -> str | None:
        rows = await gateway.running.store(lambda store: store._db.rows("SELECT finish_reason FROM responses"))
        return str(rows[0]["finish_reason"]) if rows[0]["finish_reason"] else None

    async with asyncio.timeout(SECONDS):
        while (found := await reason()) is None:
            pass
    assert (found, engine.finished) == ("cancelled", 1)


async def test_a_failure_within_a_stream_is_its_last_event(gateway: Gateway) -> None:
    engine = gateway.running.engine
    engine.hold_after = 2
    streaming = asyncio.create_task(gateway.chunks())
    await asyncio.wait_for(engine.holding.wait(), SECONDS)
    engine.dies = True
    engine.go_on.set()
    *_, last = await streaming
    assert last == {
        "error": {"message": "The engine stopped.", "type": "server_error", "param": None, "code": "engine_dead"}
    }


async def test_a_repeated_idempotency_key_is_answered_once(gateway: Gateway) -> None:
    body = {"model": "prefloop", "messages": SAID}
    found = [
        (await gateway.post("/v1/chat/completions", body, **{"idempotency-key": "once"})).json()["id"] for _ in range(2)
    ]
    assert found[0] == found[1]
    assert len(gateway.running.engine.prompts) == 1


async def test_a_repeat_of_a_cancelled_request_says_so(gateway: Gateway) -> None:
    engine, body = gateway.running.engine, {"model": "prefloop", "messages": SAID}
    engine.hold_after = 2
    asking = asyncio.create_task(gateway.post("/v1/chat/completions", body, **{"idempotency-key": "once"}))
    await asyncio.wait_for(engine.holding.wait(), SECONDS)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    # Not a status that clients try again.
    assert error(await gateway.post("/v1/chat/completions", body, **{"idempotency-key": "once"})) == (
        400, "The first request with this Idempotency-Key was cancelled; send it with another.", None,
        "request_cancelled",
    )  # fmt: skip


async def test_a_server_that_is_away(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running, serving_gateway(running) as gateway:
        await running.app.stop(0)
        response = await gateway.complete()
        assert error(response)[:1] == (503,)
        assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/completions", 404),
        ("POST", "/v1/responses", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/", 404),
    ],
)
async def test_what_is_not_served_says_so(gateway: Gateway, method: str, path: str, status: int) -> None:
    response: httpx.Response = await gateway.http.request(method, path, headers={"content-type": "application/json"})
    assert error(response) == (
        status,
        f"{method} {path} is not served; /v1/chat/completions, /v1/models and /v1/feedback are.",
        None,
        "unknown_url",
    )

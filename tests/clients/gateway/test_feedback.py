"""/v1/feedback over real HTTP: what is stored, and who may."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.store.store import Store
from tests.clients.gateway.conftest import SECONDS, Gateway, error, serving_gateway
from tests.server.conftest import running_server


async def votes(gateway: Gateway, user: str = "ann") -> list[tuple[str, str, str]]:
    """Kind, value and comment of a user's current feedback."""

    def read(store: Store) -> list[tuple[str, str, str]]:
        return [(vote.kind, vote.value, vote.comment) for vote in store.feedback.page(user, 100)]

    return await gateway.running.store(read)


async def completion(gateway: Gateway, **fields: Any) -> str:
    return str((await gateway.complete(**fields)).json()["id"])


async def test_a_thumb_a_correction_and_a_choice(gateway: Gateway) -> None:
    answer, comparison = await completion(gateway), await completion(gateway, n=2)
    response = await gateway.post("/v1/feedback", {"id": answer, "value": True, "comment": "nice"})
    [thumb] = response.json()["data"]
    assert {name: thumb[name] for name in ("object", "completion_id", "value", "comment")} == {
        "object": "feedback", "completion_id": answer, "value": True, "comment": "nice",
    }  # fmt: skip
    [again, correction] = (
        await gateway.post("/v1/feedback", {"id": answer, "value": False, "correction": "better"})
    ).json()["data"]
    assert (again["id"], again["value"], correction["correction"]) == (thumb["id"], False, "better")
    [choice] = (await gateway.post("/v1/feedback", {"id": comparison, "value": "both_bad"})).json()["data"]
    assert (choice["value"], choice["completion_id"]) == ("both_bad", comparison)
    assert await votes(gateway) == [("choice", "BOTH_BAD", ""), ("correction", "better", ""), ("thumb", "DOWN", "")]


@pytest.mark.parametrize(("word", "stored"), [("a", "A"), ("b", "B"), ("tie", "TIE"), ("both_bad", "BOTH_BAD")])
async def test_every_choice(gateway: Gateway, word: str, stored: str) -> None:
    await gateway.post("/v1/feedback", {"id": await completion(gateway, n=2), "value": word})
    assert await votes(gateway) == [("choice", stored, "")]


async def test_a_second_completion_is_compared_with_the_first(gateway: Gateway) -> None:
    gateway.running.engine.answers = ["first", "second"]
    first, second = await completion(gateway), await completion(gateway)
    body = {"id": first, "other_id": second, "value": "b", "comment": "longer"}
    [choice] = (await gateway.post("/v1/feedback", body)).json()["data"]
    assert (choice["value"], choice["comment"]) == ("b", "longer")
    # Changed, not counted twice.
    [again] = (await gateway.post("/v1/feedback", {**body, "value": "tie"})).json()["data"]
    assert (again["id"], again["completion_id"]) == (choice["id"], choice["completion_id"])
    assert await votes(gateway) == [("choice", "TIE", "longer")]
    assert error(await gateway.post("/v1/feedback", {**body, "id": second, "other_id": first})) == (
        400, "response_id_a must be the answer that came first.", "id", "invalid_field",
    )  # fmt: skip
    other = await completion(gateway, messages=[{"role": "user", "content": "other"}])
    assert error(await gateway.post("/v1/feedback", {**body, "other_id": other}))[:2] == (
        409, "The two answers are not to the same messages.",
    )  # fmt: skip


async def test_an_answer_may_be_named_by_its_messages(gateway: Gateway) -> None:
    answer = (await gateway.complete()).json()
    said = [{"role": "user", "content": "hello there"}, answer["choices"][0]["message"]]
    [thumb] = (await gateway.post("/v1/feedback", {"messages": said, "value": False})).json()["data"]
    assert thumb["completion_id"] == answer["id"]
    said[1] = {"role": "assistant", "content": "another"}
    assert (await gateway.post("/v1/feedback", {"messages": said, "value": False})).status_code == 404


async def test_the_version_is_named_once_the_choice_is_made(gateway: Gateway) -> None:
    comparison = await completion(gateway, n=2)
    found = await gateway.running.store(lambda store: store.responses.comparison("ann", comparison))
    assert found.state == "open"
    await gateway.post("/v1/feedback", {"id": comparison, "value": "a"})
    found = await gateway.running.store(lambda store: store.responses.comparison("ann", comparison))
    assert (found.state, found.continued_with) == ("chosen", "A")


async def test_a_repeated_idempotency_key_counts_once(gateway: Gateway) -> None:
    body = {"id": await completion(gateway), "value": True}
    found = [
        (await gateway.post("/v1/feedback", body, **{"idempotency-key": "once"})).json()["data"][0] for _ in range(2)
    ]
    assert found[0] == found[1]
    events = await gateway.running.store(lambda store: store._db.rows("SELECT count(*) AS n FROM feedback_events"))
    assert events == [{"n": 1}]
    other = await gateway.post("/v1/feedback", {**body, "value": False}, **{"idempotency-key": "once"})
    assert error(other) == (
        400, "This request_id was used with another body; use a new one.", "idempotency-key", "request_id_reused",
    )  # fmt: skip


async def test_feedback_is_retracted(gateway: Gateway) -> None:
    body = {"id": await completion(gateway), "value": True}
    [thumb] = (await gateway.post("/v1/feedback", body)).json()["data"]
    response = await gateway.http.delete(f"/v1/feedback/{thumb['id']}")
    assert response.json() == {"id": thumb["id"], "object": "feedback.deleted", "deleted": True}
    assert await votes(gateway) == []
    assert error(await gateway.http.delete(f"/v1/feedback/{thumb['id']}"))[0] == 404


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"value": True}, (400, "Feedback has the id of a completion, or the messages that end with it.", "id", None)),
        ({"id": "resp_x", "messages": [], "value": True},
         (400, "Feedback has the id of a completion, or the messages that end with it.", "id", None)),
        ({"messages": [{"role": "user", "content": "a"}], "value": True},
         (400, "messages must end with the assistant's message after the user's.", "messages", "invalid_field")),
        ({"id": "resp_x"}, (400, "Feedback has a value, a correction or both.", "value", None)),
        ({"id": "resp_x", "correction": "y", "comment": "z"}, (400, "A comment goes with a value.", "comment", None)),
        ({"id": "resp_x", "other_id": "resp_y", "value": True},
         (400, 'other_id goes with the value "a", "b", "tie" or "both_bad".', "other_id", None)),
        ({"id": "resp_x", "value": "c"}, (400, "value: Input should be a valid boolean.", "value", None)),
        ({"id": "resp_x", "value": 1}, (400, "value: Input should be a valid boolean.", "value", None)),
        ({"id": "resp_x", "value": True, "score": 1}, (400, "score: Extra inputs are not permitted.", "score", None)),
        ({"id": "resp_x", "value": True}, (404, "There is no response 'resp_x'.", None, "not_found")),
        ({"id": "cmp_x", "value": "a"}, (404, "There is no comparison 'cmp_x'.", None, "not_found")),
        ({"id": "resp_x", "correction": " "}, (400, "text must not be empty.", "correction", "invalid_field")),
    ],
)  # fmt: skip
async def test_what_is_invalid_is_refused_by_name(gateway: Gateway, body: dict[str, Any], expected: Any) -> None:
    assert error(await gateway.post("/v1/feedback", body)) == expected


async def test_a_choice_before_both_answers_have_ended(gateway: Gateway) -> None:
    engine = gateway.running.engine
    engine.dies = True
    await gateway.complete(n=2)
    rows = await gateway.running.store(lambda store: store._db.rows("SELECT id FROM comparisons"))
    response = await gateway.post("/v1/feedback", {"id": rows[0]["id"], "value": "a"})
    assert response.status_code == 409


async def test_keys_and_end_users(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running, serving_gateway(running, default_name=None) as gateway:
        # Strangers can reach it, and the server knows nobody.
        status, message, _, _ = error(await gateway.complete())
        assert (status, message[:30]) == (403, "Strangers can reach this gatew")
        ann, shop = [
            await running.store(lambda store, user=user, role=role: store.keys.create(user, role))
            for user, role in [("ann", "user"), ("shop", "application")]
        ]
        async with asyncio.timeout(SECONDS):
            while (await gateway.complete(ann)).status_code != 200:
                pass
        for key in ("Bearer", "Bearer key_none.none", "Bearer clé", f"Basic {ann}", ann):
            headers = {"authorization": key.encode(), "content-type": "application/json"}
            response = await gateway.http.post(
                "/v1/chat/completions", content='{"model": "prefloop", "messages": [{"role": "user", "content": "a"}]}',
                headers=headers,
            )  # fmt: skip
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), key
        # The page's cookie is not read.
        cookies = {"prefloop_key": ann, "__Host-prefloop_key": ann}
        response = await gateway.http.get("/v1/models", headers={"cookie": "; ".join(map("=".join, cookies.items()))})
        assert response.status_code == 401

        hers = str((await gateway.complete(shop, user="zoe")).json()["id"])
        body = {"id": hers, "value": True}
        assert (await gateway.post("/v1/feedback", {**body, "safety_identifier": "zoe"}, shop)).status_code == 200
        assert await votes(gateway, "shop/zoe") == [("thumb", "UP", "")]
        # A header may name the end user, too.
        for name in ("x-end-user", "x-openwebui-user-id"):
            assert (await gateway.post("/v1/feedback", body, shop, **{name: "zoe"})).status_code == 200
            assert (await gateway.post("/v1/feedback", body, shop, **{name: "yan"})).status_code == 404
            assert (await gateway.post("/v1/feedback", body, ann, **{name: "zoe"})).status_code == 403
        for key, user in [(shop, "yan"), (shop, None), (ann, None)]:
            assert error(await gateway.post("/v1/feedback", {**body, "user": user}, key))[0] == 404
        assert error(await gateway.complete(ann, user="zoe")) == (
            403, "Only a key with the role application may name an end user.", None, "permission_denied",
        )  # fmt: skip
        [vote] = await running.store(lambda store: store.feedback.page("shop/zoe", 10))
        assert (await delete(gateway, vote.id, shop)).status_code == 404
        assert (await delete(gateway, f"{vote.id}?user=zoe", shop)).status_code == 200


async def delete(gateway: Gateway, path: str, key: str) -> Any:
    return await gateway.http.delete(f"/v1/feedback/{path}", headers={"authorization": f"Bearer {key}"})

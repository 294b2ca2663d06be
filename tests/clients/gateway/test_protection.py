"""Which requests are refused before they are read: by host, site, type, length and rate."""

from typing import Any

import pytest

from clients.gateway import protection
from tests.clients.gateway.conftest import SAID, Gateway, error, serving_gateway

BODY = {"model": "prefloop", "messages": SAID}
SITE = "https://app.example.org"


async def test_another_host_is_refused(gateway: Gateway) -> None:
    port = gateway.url.rpartition(":")[2]
    for host in ("attacker.example", f"attacker.example:{port}", "127.0.0.1.attacker.example", ""):
        response = await gateway.http.get("/v1/models", headers={"host": host})
        assert error(response)[:2] == (400, f"This gateway does not serve the host {host.partition(':')[0]!r}.")
    for host in ("127.0.0.1", f"127.0.0.1:{port}"):
        assert (await gateway.http.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": SITE},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://127.0.0.1:1"},
    ],
)
async def test_another_site_is_refused(gateway: Gateway, headers: dict[str, str]) -> None:
    response = await gateway.post("/v1/chat/completions", BODY, **headers)
    sentence = "This request was sent by another site, which is not among the allowed origins."
    assert error(response)[:2] == (403, sentence)
    assert gateway.running.engine.prompts == []
    assert "access-control-allow-origin" not in response.headers


async def test_its_own_pages_scripts_may_call(gateway: Gateway) -> None:
    for headers in ({"origin": gateway.url}, {"sec-fetch-site": "same-origin", "origin": gateway.url}):
        assert (await gateway.post("/v1/chat/completions", BODY, **headers)).status_code == 200


async def test_an_allowed_origin_may_call(gateway: Gateway) -> None:
    async with serving_gateway(gateway.running, origins=[SITE]) as open_:
        asked = {
            "origin": SITE, "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type, x-stainless-lang",
        }  # fmt: skip
        preflight = await open_.http.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == SITE
        assert "x-stainless-lang" in preflight.headers["access-control-allow-headers"]
        headers = {"origin": SITE, "sec-fetch-site": "cross-site"}
        response = await open_.post("/v1/chat/completions", BODY, **headers)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, SITE)
        # Its refusals can be read, too.
        response = await open_.post("/v1/feedback", {}, **headers)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (400, SITE)
        refused = await open_.http.options("/v1/chat/completions", headers={**asked, "origin": "https://other.example"})
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
async def test_only_json_is_read(gateway: Gateway, kind: str) -> None:
    response = await gateway.http.post("/v1/chat/completions", content=b"{}", headers={"content-type": kind})
    assert error(response)[:2] == (415, "The content type must be application/json.")
    kind = "application/json; charset=utf-8"
    response = await gateway.http.post("/v1/chat/completions", content=b"{}", headers={"content-type": kind})
    assert response.status_code == 400


async def test_a_body_may_not_be_longer_than_what_the_server_reads(gateway: Gateway) -> None:
    response = await gateway.complete(messages=[{"role": "user", "content": "a" * 5_000_000}])
    assert error(response)[:2] == (413, "The body has more than 4194304 bytes.")


async def test_rates(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protection, "KEY_RATE", 3)
    monkeypatch.setattr(protection, "FAILURE_RATE", 2)
    await gateway.running.store(lambda store: store.keys.create("ann", "user"))

    async def ask(bound: Gateway, key: str) -> Any:
        return await bound.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})

    async with serving_gateway(gateway.running, default_name=None) as bound:
        # The server may not know of its first key yet.
        while (await ask(bound, "wrong-0")).status_code != 401:
            monkeypatch.setattr(protection, "KEY_RATE", 3)
    async with serving_gateway(gateway.running, default_name=None) as bound:
        assert [(await ask(bound, f"wrong-{number}")).status_code for number in range(3)] == [401, 401, 429]
        refused = await ask(bound, "wrong-9")
        assert error(refused)[1] == "Too many requests with invalid keys came from this address."
        assert refused.headers["retry-after"] == "60"
    key = await gateway.running.store(lambda store: store.keys.create("ann", "user"))
    async with serving_gateway(gateway.running, default_name=None) as bound:
        while (await ask(bound, key)).status_code == 401:
            pass
    async with serving_gateway(gateway.running, default_name=None) as bound:
        assert [(await ask(bound, key)).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert error(await ask(bound, key))[1] == "The limit is 3 requests per minute and key."

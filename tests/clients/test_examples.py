"""The examples in the docstrings run, with and without asyncio, and print the output shown."""

import ast
import doctest
import inspect
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import grpc
import pytest
from prefloop.v1 import chat_pb2, feedback_pb2

import clients
from clients import AsyncClient, Client, PrefloopError
from clients.errors import KINDS
from tests.clients.conftest import ANSWERED, WAIT_SECONDS, FakeService

METHODS = sorted(name for name, value in vars(AsyncClient).items() if inspect.isfunction(value) and name[0] != "_")


def examples(client: type, method: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(getattr(client, method)) or "")


def names(client: object) -> dict[str, Any]:
    """The names that an example may use without importing them."""
    return {**vars(clients), **vars(chat_pb2), **vars(feedback_pb2), "client": client}


async def check(example: doctest.Example, known: dict[str, Any]) -> None:
    code = compile(example.source, "<example>", "single", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    with redirect_stdout(io.StringIO()) as printed:
        result = eval(code, known)
        if inspect.isawaitable(result):
            await result
    # As in the standard library's runner, except that the output need not end with a newline.
    assert printed.getvalue().removesuffix("\n") == example.want.removesuffix("\n"), example.source


@pytest.fixture(autouse=True)
def answered(service: FakeService) -> None:
    service.conversation.turns.append(ANSWERED)


@pytest.mark.parametrize("method", METHODS)
async def test_an_async_methods_example(method: str, address: str) -> None:
    assert examples(AsyncClient, method), "Every public method needs an example."
    async with AsyncClient(address, user="ana", timeout=WAIT_SECONDS) as client:
        known = names(client)
        for example in examples(AsyncClient, method):
            await check(example, known)


@pytest.mark.parametrize("method", METHODS)
async def test_the_same_example_without_asyncio(method: str, client: Client) -> None:
    known = names(client)
    assert len(examples(Client, method)) == len(examples(AsyncClient, method))
    for example in examples(Client, method):
        assert "await" not in example.source
        await check(example, known)


async def test_the_examples_on_the_clients_page(root: Path, address: str) -> None:
    page = (root / "docs" / "client.md").read_text()
    known = {**names(None), "address": address}
    found = [
        example
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        for example in doctest.DocTestParser().get_examples(block)
    ]
    assert len(found) == 10
    for example in found:
        await check(example, known)


def test_the_clients_page_says_what_every_error_means(root: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .+ \|$", (root / "docs" / "client.md").read_text(), re.MULTILINE)
    errors = {name for name, kind in vars(clients).items() if inspect.isclass(kind) and issubclass(kind, PrefloopError)}
    assert {name for name, _ in rows} == errors - {"PrefloopError"}
    codes = {code: name for name, listed in rows for code in re.findall(r"[A-Z_]{5,}", listed)}
    assert codes == {code.name: kind.__name__ for code, kind in KINDS.items()} | {"CANCELLED": "UnavailableError"}
    assert set(codes) < {code.name for code in grpc.StatusCode}

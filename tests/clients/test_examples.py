"""The examples in the docstrings run, with and without asyncio, and print what they say."""

import ast
import doctest
import inspect
import io
from contextlib import redirect_stdout
from typing import Any

import pytest
from prefloop.v1 import chat_pb2, feedback_pb2

import clients
from clients import AsyncClient, Client
from tests.clients.conftest import ANSWERED, WAIT_SECONDS, FakeService

METHODS = sorted(name for name, value in vars(AsyncClient).items() if inspect.isfunction(value) and name[0] != "_")


def examples(client: type, method: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(getattr(client, method)) or "")


def names(client: object) -> dict[str, Any]:
    """What an example may speak of without importing it."""
    return {**vars(clients), **vars(chat_pb2), **vars(feedback_pb2), "client": client}


async def check(example: doctest.Example, known: dict[str, Any]) -> None:
    code = compile(example.source, "<example>", "single", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    with redirect_stdout(io.StringIO()) as printed:
        result = eval(code, known)
        if inspect.isawaitable(result):
            await result
    # As in the standard library's runner, but that an answer's last line need not end.
    assert printed.getvalue().removesuffix("\n") == example.want.removesuffix("\n"), example.source


@pytest.fixture(autouse=True)
def answered(service: FakeService) -> None:
    service.conversation.turns.append(ANSWERED)


@pytest.mark.parametrize("method", METHODS)
async def test_an_async_methods_example(method: str, address: str) -> None:
    assert examples(AsyncClient, method), "Every public method has an example."
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

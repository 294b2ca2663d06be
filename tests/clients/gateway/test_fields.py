"""Every field that OpenAI's API has: served, accepted because it changes nothing, or refused by its name. And the page
that says so."""

import asyncio
import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from clients.gateway.fields import NEUTRAL, SERVED
from tests.clients.gateway.conftest import Gateway, error

NEUTRAL_VALUES: list[tuple[str, Any]] = [
    ("top_p", 1), ("top_p", 1.0), ("presence_penalty", 0), ("frequency_penalty", 0.0), ("top_logprobs", 0),
    ("logprobs", False), ("logit_bias", {}), ("tools", []), ("functions", []), ("tool_choice", "auto"),
    ("tool_choice", "none"), ("function_call", "none"), ("parallel_tool_calls", True), ("parallel_tool_calls", False),
    ("response_format", {"type": "text"}), ("modalities", ["text"]), ("service_tier", "auto"), ("store", False),
    ("metadata", {"a": "b"}), ("prompt_cache_key", "k"), ("stream_options", {"include_obfuscation": False}),
    ("prompt_cache_retention", "24h"),
]  # fmt: skip
OTHER_VALUES: list[tuple[str, Any, str]] = [
    ("top_p", 0.9, "1"), ("top_p", True, "1"), ("presence_penalty", 0.1, "0"), ("frequency_penalty", -1, "0"),
    ("top_logprobs", 3, "0"), ("logprobs", True, "false"), ("logprobs", 0, "false"), ("logit_bias", {"5": 1}, "empty"),
    ("tools", [{"type": "function"}], "empty"), ("tool_choice", "required", "`none` or `auto`"),
    ("response_format", {"type": "json_object"}, "`text`"), ("modalities", ["audio"], "`text`"),
    ("service_tier", "priority", "`auto` or `default`"), ("store", True, "false"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NEUTRAL_VALUES)
async def test_a_value_that_changes_nothing_is_accepted(gateway: Gateway, name: str, value: Any) -> None:
    assert (await gateway.complete(**{name: value})).status_code == 200


@pytest.mark.parametrize(("name", "value", "words"), OTHER_VALUES)
async def test_any_other_value_is_refused_by_name(gateway: Gateway, name: str, value: Any, words: str) -> None:
    assert error(await gateway.complete(**{name: value})) == (
        400, f"{name} is served only if it changes nothing: {words}.", name, "unsupported_value",
    )  # fmt: skip


async def test_every_field_of_openais_is_known_or_refused(gateway: Gateway) -> None:
    """Also those that its SDK will have: whatever is in neither table is refused."""
    tried = {name for name, _ in NEUTRAL_VALUES}
    assert tried - {"stream_options"} == set(NEUTRAL)
    fields = set(get_type_hints(CompletionCreateParamsBase)) | {"stream"}
    assert set(SERVED) <= fields
    unknown = sorted(fields - set(SERVED) - set(NEUTRAL))
    assert "reasoning_effort" in unknown
    for name in [*unknown, "top_k", "extra"]:
        assert error(await gateway.complete(**{name: "x"})) == (
            400, f"{name} is not served.", name, "unsupported_parameter",
        )  # fmt: skip
        # null is the same as leaving it out.
        assert (await gateway.complete(**{name: None})).status_code == 200


async def test_every_served_field_may_be_null(gateway: Gateway) -> None:
    fields = dict.fromkeys(set(SERVED) - {"model", "messages"})
    assert (await gateway.complete(**fields)).status_code == 200


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs" / "gateway.md").read_text()


def test_the_page_has_the_table(root: Path, page: str, tmp_path: Path) -> None:
    made = tmp_path / "made.md"
    subprocess.run([sys.executable, "docs/gateway.py", str(made)], cwd=root, check=True, timeout=60)
    assert made.read_text() == page, "run `make docs`"


async def test_the_example_runs_as_it_stands(gateway: Gateway, root: Path, page: str) -> None:
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    # The same ten lines in the README.
    assert example in (root / "README.md").read_text()
    said = io.StringIO()

    def run() -> None:
        with contextlib.redirect_stdout(said):
            exec(example.replace("http://127.0.0.1:8080", gateway.url), {})

    await asyncio.to_thread(run)
    assert said.getvalue() == "one two three four \n"
    votes = await gateway.running.store(lambda store: store.feedback.page("ann", 10))
    assert [(vote.kind, vote.value) for vote in votes] == [("thumb", "UP")]

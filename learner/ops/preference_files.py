"""Reads files of preferences in the format of TRL: `prompt`, `chosen` and `rejected`, as JSON lines or Parquet.

Each is a text, or a list of messages with `role` and `content`. Without `prompt`, both answers begin with it, as lists
of messages. https://huggingface.co/docs/trl/dataset_formats#preference
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from server.store.learning.imports import ImportedPreference

# Rows of a Parquet file that are read at once.
BATCH = 1_000
ROLES = ("system", "user", "assistant")
Messages = list[dict[str, str]]


class PreferenceFileError(Exception):
    """A file cannot be imported; the message says which row, and why."""


def read_preferences(path: Path) -> Iterator[ImportedPreference]:
    """The preferences of a file, in order. Raises PreferenceFileError and OSError."""
    for number, row in enumerate(read_rows(path), start=1):
        try:
            yield to_preference(row)
        except ValueError as error:
            raise PreferenceFileError(f"Row {number} of {path.name}: {error}.") from error


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of a file, whose name says what it is. Raises PreferenceFileError."""
    readers: dict[str, Callable[[Path], Iterable[Any]]] = {
        ".jsonl": read_json_lines,
        ".json": read_json_lines,
        ".parquet": read_parquet,
    }
    if path.suffix not in readers:
        raise PreferenceFileError(f"{path.name} is neither .jsonl nor .parquet.")
    yield from readers[path.suffix](path)


def read_json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise PreferenceFileError(f"Line {number} of {path.name} is no JSON: {error}.") from error


def read_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise PreferenceFileError("Parquet files need pyarrow: pip install 'prefloop[parquet]'.") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(BATCH):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise PreferenceFileError(f"{path.name} cannot be read: {error}.") from error


def to_preference(row: Any) -> ImportedPreference:
    """The preference in a row. Raises ValueError with the end of a sentence."""
    if not isinstance(row, Mapping):
        raise ValueError("it is no object")
    if missing := [name for name in ("chosen", "rejected") if not row.get(name)]:
        raise ValueError(f"`{missing[0]}` is missing")
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt"):
        prompt = messages(row["prompt"], "prompt")
    else:
        prompt, chosen, rejected = without_prompt(messages(chosen, "chosen"), messages(rejected, "rejected"))
    if prompt[-1]["role"] != "user":
        raise ValueError("the prompt does not end with a user's message")
    return ImportedPreference(prompt, answer(chosen, "chosen"), answer(rejected, "rejected"))


def messages(value: Any, name: str) -> Messages:
    """A prompt or an answer as messages; a text is the user's. Raises ValueError."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` is neither a text nor a list of messages")
    for one in value:
        known = isinstance(one, Mapping) and one.get("role") in ROLES and isinstance(one.get("content"), str)
        if not known:
            raise ValueError(f"`{name}` has a message without a role or without content")
    return [{"role": one["role"], "content": one["content"]} for one in value]


def without_prompt(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The prompt that both begin with, and their answers. Raises ValueError if they begin differently."""
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise ValueError("there is no `prompt`, and `chosen` and `rejected` do not begin with the same messages")
    return chosen[:-1], chosen[-1:], rejected[-1:]


def answer(value: Any, name: str) -> str:
    """The text of an answer. Raises ValueError for more than one message."""
    found = messages(value, name)
    if len(found) != 1 or (not isinstance(value, str) and found[0]["role"] != "assistant"):
        raise ValueError(f"`{name}` is not one message of the assistant")
    if not found[0]["content"].strip():
        raise ValueError(f"`{name}` is empty")
    return found[0]["content"]

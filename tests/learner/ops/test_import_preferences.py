"""`learner import`: files in TRL's format of preferences, stored whole or not at all, listed and removed as one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.ops.preference_files import PreferenceFileError, read_preferences, to_preference
from server.store.learning.imports import ImportedPreference
from server.store.store import Store
from tests.learner.ops.test_rebase import learner

USER = [{"role": "user", "content": "why?"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def store(data_dir: Path) -> Iterator[Store]:
    store = Store.open(data_dir)
    yield store
    store.close()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "why?", "chosen": "so", "rejected": "no"},
        {"prompt": USER, "chosen": said("so"), "rejected": said("no")},
        {"prompt": USER, "chosen": "so", "rejected": "no", "score": 3},
        {"chosen": USER + said("so"), "rejected": USER + said("no")},
    ],
)
def test_every_form_of_the_format_is_read(row: dict[str, Any]) -> None:
    assert to_preference(row) == ImportedPreference(USER, "so", "no")


def test_a_prompt_may_have_several_turns() -> None:
    talk = [{"role": "system", "content": "short"}, *USER, *said("who?"), *USER]
    assert to_preference({"prompt": talk, "chosen": "so", "rejected": "no"}).prompt == talk
    assert to_preference({"chosen": talk + said("so"), "rejected": talk + said("no")}).prompt == talk


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("why?", "it is no object"),
        ({"prompt": "why?", "chosen": "so"}, "`rejected` is missing"),
        ({"prompt": "why?", "chosen": "", "rejected": "no"}, "`chosen` is missing"),
        ({"prompt": "why?", "chosen": " ", "rejected": "no"}, "`chosen` is empty"),
        ({"prompt": 3, "chosen": "so", "rejected": "no"}, "`prompt` is neither a text nor a list of messages"),
        ({"prompt": [{"role": "bot", "content": "a"}], "chosen": "so", "rejected": "no"}, "without a role"),
        ({"prompt": [{"role": "user"}], "chosen": "so", "rejected": "no"}, "without a role or without content"),
        ({"prompt": said("why"), "chosen": "so", "rejected": "no"}, "does not end with a user's message"),
        ({"prompt": USER, "chosen": said("so") * 2, "rejected": "no"}, "`chosen` is not one message of the assistant"),
        ({"prompt": USER, "chosen": USER, "rejected": "no"}, "`chosen` is not one message of the assistant"),
        ({"chosen": "so", "rejected": "no"}, "do not begin with the same messages"),
        ({"chosen": USER + said("so"), "rejected": [*said("a"), *said("no")]}, "do not begin with the same messages"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(row: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        to_preference(row)


def test_parquet_is_read_as_json_lines_are(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": USER, "chosen": said(f"so {n}"), "rejected": said("no")} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = list(read_preferences(tmp_path / "a.parquet"))
    assert [one.chosen for one in found] == ["so 0", "so 1", "so 2"]
    assert list(read_preferences(tmp_path / "a.jsonl")) == found


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", "prompt,chosen", "a.csv is neither .jsonl nor .parquet."),
        ("a.jsonl", "{", "Line 1 of a.jsonl is no JSON"),
        ("a.parquet", "{", "a.parquet cannot be read"),
        ("a.jsonl", '{"chosen": 1}', "Row 1 of a.jsonl: `rejected` is missing."),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: str, why: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PreferenceFileError, match=why):
        list(read_preferences(tmp_path / name))


def write(path: Path, count: int, *more: str) -> Path:
    lines = [json.dumps({"prompt": f"w{n} w4", "chosen": "w7 w8", "rejected": "w9"}) for n in range(3, 3 + count)]
    path.write_text("\n".join([*lines, *more]) + "\n")
    return path


def test_imports_are_listed_and_removed_as_one(data_dir: Path, store: Store, tmp_path: Path) -> None:
    first, second = write(tmp_path / "first.jsonl", 5), write(tmp_path / "second.jsonl", 2)
    assert learner("import", str(first), data_dir=data_dir) == (
        0, "5 preferences were imported as 'first'. The next round reads at most 1000.",
    )  # fmt: skip
    said_twice = learner("import", str(first), data_dir=data_dir)
    assert said_twice == (
        1, "learner: There is an import 'first' already: remove it first, or choose another name.",
    )  # fmt: skip
    assert learner("import", str(second), "--name", "others", data_dir=data_dir)[0] == 0
    assert learner("imports", data_dir=data_dir) == (
        0, "first  5 preferences from first.jsonl\nothers  2 preferences from second.jsonl",
    )  # fmt: skip
    assert [one.prompt[0]["content"] for one in store.imports.preferences(3)] == ["w3 w4", "w6 w4", "w4 w4"]
    assert len(store.imports.preferences(7)) == len(store.imports.preferences(100)) == 7
    assert learner("imports", "--remove", "first", data_dir=data_dir) == (
        0, "'first' was removed with its 5 preferences. What was trained on them stays.",
    )  # fmt: skip
    assert [one.name for one in store.imports.all()] == ["others"]
    assert len(store.imports.preferences(100)) == 2
    code, sentence = learner("imports", "--remove", "first", data_dir=data_dir)
    assert (code, sentence) == (1, "learner: There is no import 'first'.")


def test_nothing_of_a_file_with_a_bad_row_is_imported(data_dir: Path, store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", 3, '{"prompt": "w3"}')
    assert learner("import", str(path), data_dir=data_dir) == (
        1, "learner: Row 4 of bad.jsonl: `chosen` is missing. Nothing was imported.",
    )  # fmt: skip
    assert (store.imports.all(), store.imports.preferences(10)) == ([], [])

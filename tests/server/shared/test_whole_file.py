"""A file is there whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest

from server.shared.whole_file import whole_file


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("before", encoding="utf-8")
    with whole_file(path) as file:
        file.write("after")
        file.flush()
        assert path.read_text(encoding="utf-8") == "before"
    assert path.read_text(encoding="utf-8") == "after"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_an_interruption_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("before", encoding="utf-8")

    def write() -> None:
        with whole_file(path) as file:
            file.write("half")
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        write()
    assert path.read_text(encoding="utf-8") == "before"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_an_interruption_right_after_creation_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = os.open

    def interrupted(*arguments: Any) -> int:
        os.close(opening(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "out.jsonl"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_path_that_is_not_a_plain_file_is_written_directly() -> None:
    with whole_file(Path(os.devnull)) as file:
        file.write("gone")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "out.jsonl", tmp_path / "latest.jsonl"
    link.symlink_to(path)
    with whole_file(link) as file:
        file.write("through it")
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8") == "through it"

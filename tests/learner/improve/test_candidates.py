"""Candidates in a round's directory, by the step that made them."""

from pathlib import Path

import pytest

from learner.improve.candidates import candidate, candidates, copy_candidate, drop_candidates


def test_candidates_of_later_steps_are_dropped(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        candidate(tmp_path, step).mkdir()
    assert candidates(tmp_path) == [1, 2, 10]
    drop_candidates(tmp_path, after=2)
    assert candidates(tmp_path) == [1, 2]


def test_a_missing_candidate_is_not_copied_as_an_empty_version(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="step-003 has no weights to publish"):
        copy_candidate(candidate(tmp_path, 3), tmp_path)
    assert list(tmp_path.iterdir()) == []

"""A round reads imported preferences: they never judge, are counted apart, and count as far as votes confirm them."""

from contextlib import closing
from pathlib import Path

import pytest

import learner.round.gate.gate_stage as judging
from learner.round.report import rows
from server.store.learning.imports import ImportedPreference
from server.store.store import Store
from tests.learner.rounds import passing, run

pytestmark = pytest.mark.usefixtures("engine")


def preferences(count: int, chosen: str, rejected: str) -> list[ImportedPreference]:
    return [
        ImportedPreference([{"role": "user", "content": f"w{3 + n % 30} w{3 + n // 30}"}], chosen, rejected)
        for n in range(count)
    ]


def test_they_are_counted_apart_and_never_judge(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    with closing(Store.open(data_dir)) as store:
        store.imports.add("likes low words", "a.jsonl", preferences(60, "w3 w4 w5 w6", "w33 w34 w35 w36"))
        # Unreadable ones are left out.
        store.imports.add("unreadable", "b.jsonl", preferences(5, "w3 " * 3000, "w3"))
    report = run(data_dir)
    assert report.state == "promoted", report.sentence
    votes, model = report.metrics.votes, report.metrics.reward_model
    assert votes is not None
    assert model is not None
    assert (votes.choices, votes.train + votes.judge, model.imported) == (80, 80, 60)
    with closing(Store.open(data_dir)) as store:
        assert len(store.lineage.round_votes(str(report.round_id))) == 80
        without = store.reward_models.all()[0]
    assert without.metrics["imported"] == 60
    assert dict(rows(report))["imported"].startswith("60 preferences, ")


def test_without_them_a_round_is_as_it_was(data_dir: Path, tmp_path: Path) -> None:
    """Few preferences, or a limit of zero, leave everything as it is."""
    import shutil

    found = []
    for name, count, limit in (("none", 0, 1000), ("few", 19, 1000), ("off", 60, 0)):
        shutil.copytree(data_dir, tmp_path / name)
        with closing(Store.open(tmp_path / name)) as store:
            store.imports.add("others", "a.jsonl", preferences(count, "w3 w4", "w33 w34"))
        report = run(tmp_path / name, reward={"imported": limit, "reference_answers": 16, "fold_repeats": 1})
        assert report.metrics.reward_model is not None
        found.append((report.metrics.reward_model.imported, report.metrics.reward_model.nll))
    assert [imported for imported, _ in found] == [0, 0, 0]
    # Votes are a few seconds older in each.
    assert [nll for _, nll in found] == pytest.approx([found[0][1]] * 3, abs=1e-3)

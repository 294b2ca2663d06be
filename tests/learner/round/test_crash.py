"""A round is killed where something becomes durable: nothing is lost or left incomplete, and the round finishes.

Some of the places; `benchmarks/crash.py` kills at all of them. That the end is the same as without the kill is what
test_resume.py shows.
"""

from contextlib import closing
from pathlib import Path

import pytest

from server.store.files.manifest import verify
from server.store.files.sharing import fetch_all
from server.store.store import Store
from tests.learner.crash import run_round, violations
from tests.learner.rounds import make_version
from tests.tiers import slow

KILLS = ["committed:9", "rename:1", slow("commit:4"), slow("fsync:8"), slow("renamed:4"), slow("prune:1")]


@pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize("failpoint", KILLS)
def test_a_round_survives_a_kill(data_dir: Path, failpoint: str) -> None:
    for version in ("v0001", "v0002", "v0003"):
        make_version(data_dir, version)
    with closing(Store.open(data_dir)) as store:
        votes = {vote.id for vote in store.feedback.page("ann", 10_000)}
    assert len(votes) == 80
    assert not run_round(data_dir, failpoint), "the failpoint was never reached"
    assert violations(data_dir, votes) == []
    assert run_round(data_dir)
    assert violations(data_dir, votes) == []
    with closing(Store.open(data_dir)) as store:
        (round_,) = store.rounds.page()
        assert (round_.state, store.policies.active().version) == ("promoted", "v0004"), round_.reason
        assert len(store.lineage.round_votes(round_.id)) == 80
    assert list(data_dir.rglob("*.partial")) == []
    # Kept: the reference, the active one, and the newest of the three that were never active.
    assert sorted(path.name for path in (data_dir / "policies").iterdir()) == ["v0000", "v0003", "v0004"]


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize("failpoint", ["put:2", *(slow(f"put:{number}") for number in range(3, 14))])
def test_a_round_that_is_killed_while_it_shares_its_versions_goes_on(
    data_dir: Path, tmp_path_factory: pytest.TempPathFactory, failpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path_factory.mktemp("shared")
    monkeypatch.setenv("PREFLOOP_POLICY_URL", shared.as_uri())
    with closing(Store.open(data_dir)) as store:
        votes = {vote.id for vote in store.feedback.page("ann", 10_000)}
    assert not run_round(data_dir, failpoint), "the failpoint was never reached"
    assert violations(data_dir, votes) == []
    assert run_round(data_dir)
    assert violations(data_dir, votes) == []
    # Another machine gets from there what this one has made.
    other = tmp_path_factory.mktemp("other")
    with closing(Store.open(other)) as store:
        (round_,) = store.rounds.page()
        assert (round_.state, store.policies.active().version) == ("promoted", "v0001"), round_.reason
        fetch_all(store, other)
        names = store.shared_versions.objects()
    made = ["policies/v0000", "policies/v0001", "reward_models/rm0001"]
    assert sorted(str(path.relative_to(other)) for path in other.glob("*/[!.]*")) == made
    for name in made:
        assert verify(other / name) == verify(data_dir / name)
    # What the kill left is below a name that no row has.
    assert len(names) == 3

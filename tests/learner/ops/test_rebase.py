"""Another model in the same data directory: made once, active at once, and the way back."""

import getpass
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from learner.cli import app
from learner.ops.rebase import find_origin
from learner.round.lease import learner_lease
from learner.round.retention import prune
from server.shared.errors import NotFoundError
from server.shared.model.text import ChatText
from server.store.files.manifest import new_version, verify
from server.store.learning.policies import Policies
from server.store.store import Store
from tests.learner.rounds import make_version
from tests.server.store.test_canaries import begin as begin_canary
from tests.server.store.test_lineage import lease

runner = CliRunner()


@pytest.fixture
def store(data_dir: Path) -> Iterator[Store]:
    store = Store.open(data_dir)
    yield store
    store.close()


def learner(*arguments: str, data_dir: Path) -> tuple[int, str]:
    result = runner.invoke(app, [*arguments, "--data-dir", str(data_dir)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, (result.stdout if result.exit_code == 0 else result.stderr).strip()


def rebase(data_dir: Path, model: Path, *more: str) -> tuple[int, str]:
    code, output = learner("rebase", "--model", str(model), *more, data_dir=data_dir)
    return code, output.splitlines()[-1]


def versions(data_dir: Path) -> list[str]:
    return sorted(path.name for path in (data_dir / "policies").iterdir())


def test_another_model_becomes_the_reference(data_dir: Path, other_model: Path, store: Store) -> None:
    make_version(data_dir, "v0001", "activate")
    code, output = learner("rebase", "--model", str(other_model), "--reason", "it is better", data_dir=data_dir)
    assert (code, output.splitlines()) == (
        0,
        [
            f"preparing {other_model} as v0002 (about half a minute, once)",
            "reading the weights",
            "saving the weights",
            f"prepared {data_dir / 'policies' / 'v0002'}",
            f"v0002 is active instead of v0001. No server is running: start it with --model {other_model}.",
        ],
    )
    manifest = verify(data_dir / "policies" / "v0002")
    assert (manifest.kind, manifest.base_version, manifest.reference_version) == ("full", "v0002", "v0002")
    assert manifest.info["model"] == str(other_model)
    assert ChatText.load(data_dir / "policies" / "v0002").answer("5") == [15, 2]
    made, before = store.policies.active(), store.policies.get("v0001")
    assert (made.version, made.kind, made.parent_version, made.round_id) == ("v0002", "full", None, None)
    assert (made.reference_version, before.reference_version, before.state) == ("v0002", "v0000", "retired")
    move = store.lineage.moves(1)[0]
    assert (move.version, move.previous_version, move.action, move.reason) == (
        "v0002", "v0001", "promote", "it is better",
    )  # fmt: skip
    assert move.actor == f"operator {getpass.getuser()}"


def test_the_same_model_again_changes_nothing(data_dir: Path, other_model: Path, store: Store) -> None:
    rebase(data_dir, other_model)
    moves = store.lineage.moves()
    assert rebase(data_dir, other_model) == (
        0,
        f"v0001, which is active, is of {other_model} already; nothing was changed.",
    )
    assert (store.lineage.moves(), versions(data_dir)) == (moves, ["v0000", "v0001"])


def test_a_running_round_keeps_it_out(
    data_dir: Path, other_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFLOOP_LEASE_SECONDS", "0.1")
    with learner_lease(store, data_dir, 5) as lease:
        assert lease
        assert rebase(data_dir, other_model) == (
            1, "learner: A learner is running a round: wait for its end, or stop it. Nothing was changed.",
        )  # fmt: skip
    assert (store.policies.active().version, versions(data_dir)) == ("v0000", ["v0000"])


def test_a_model_that_cannot_be_served_changes_nothing(data_dir: Path, tmp_path: Path, store: Store) -> None:
    code, said = rebase(data_dir, tmp_path / "none")
    assert code == 1
    assert said.endswith("does not exist; give a Hugging Face directory or id.")
    assert (store.policies.active().version, versions(data_dir)) == ("v0000", ["v0000"])


@pytest.mark.parametrize("step", ["register", "activate"])
def test_killed_before_the_pointer_moved_it_continues(
    data_dir: Path, other_model: Path, store: Store, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Policies, step, killed)
        code, output = learner("rebase", "--model", str(other_model), data_dir=data_dir)
    assert (code, output.splitlines()[-1]) == (130, "learner: Stopped. The next `learner rebase` continues.")
    assert (store.policies.active().version, versions(data_dir)) == ("v0000", ["v0000", "v0001"])
    with pytest.raises(NotFoundError):
        store.policies.get("v0001")
    code, output = learner("rebase", "--model", str(other_model), data_dir=data_dir)
    # It is not prepared again.
    assert output == f"v0001 is active instead of v0000. No server is running: start it with --model {other_model}."
    assert (store.policies.active().version, versions(data_dir)) == ("v0001", ["v0000", "v0001"])


def test_a_canary_has_nothing_left_to_decide(data_dir: Path, other_model: Path, store: Store) -> None:
    begin_canary(store)
    store.leases.release(lease(store))
    rebase(data_dir, other_model)
    assert store.canaries.waiting() is None
    canary = store.canaries.find("v0001")
    assert canary is not None
    said = f"operator {getpass.getuser()} made v0002 the active version: the model is {other_model}"
    assert canary.outcome == said
    assert store.policies.get("v0001").state == "rejected"


def test_back_to_the_version_that_was_served_last(
    data_dir: Path, model_directory: Path, other_model: Path, store: Store
) -> None:
    make_version(data_dir, "v0001", "activate")
    make_version(data_dir, "v0002")
    rebase(data_dir, other_model)
    assert rebase(data_dir, model_directory)[1] == (
        f"v0001 is active instead of v0003. No server is running: start it with --model {model_directory}."
    )
    assert [move.action for move in store.lineage.moves(2)] == ["promote", "promote"]
    assert rebase(data_dir, other_model)[1].startswith("v0003 is active instead of v0001. ")
    # And by a rollback.
    assert learner("rollback", data_dir=data_dir) == (
        0, f"v0001 is active instead of v0003. No server is running: start it with --model {model_directory}.",
    )  # fmt: skip
    assert versions(data_dir) == ["v0000", "v0001", "v0002", "v0003"]


def test_servers_with_another_model_are_named(
    data_dir: Path, model_directory: Path, other_model: Path, store: Store
) -> None:
    store.replicas.report("here:1", "v0000", "")
    assert rebase(data_dir, other_model)[1] == (
        f"v0001 is active instead of v0000. Restart here:1 with --model {other_model}; until then, what is loaded "
        "there is served."
    )
    assert learner("rollback", data_dir=data_dir)[1] == (
        f"v0000 is active instead of v0001. Every running server was started with its model, {model_directory}."
    )


def test_what_was_fine_tuned_is_no_model_of_its_own(
    data_dir: Path, model_directory: Path, other_model: Path, store: Store
) -> None:
    """It is of the model that it was fine-tuned from: one goes back to it, and it is not that model's origin."""
    fine_tuned = data_dir / "policies" / "v0001"
    info = {"model": str(model_directory), "round_id": "round_1"}
    with new_version(fine_tuned, kind="full", reference_version="v0001", info=info) as staging:
        shutil.copytree(data_dir / "policies" / "v0000", staging, dirs_exist_ok=True)
        (staging / "manifest.json").unlink()
    store.policies.register(
        "v0001", kind="full", state="candidate", parent_version="v0000", reference_version="v0001", round_id=None,
        reward_model_version=None, metrics={},
    )  # fmt: skip
    store.policies.activate("v0001", actor="learner")
    assert find_origin(data_dir, str(model_directory)) == "v0000"
    assert "is of" in rebase(data_dir, model_directory)[1]
    assert rebase(data_dir, other_model)[1].startswith("v0002 is active instead of v0001")
    assert rebase(data_dir, model_directory)[1].startswith("v0001 is active instead of v0002")


def test_the_way_back_is_never_pruned(data_dir: Path, other_model: Path, store: Store) -> None:
    for number in range(1, 4):
        make_version(data_dir, f"v000{number}", "activate" if number == 2 else None)
    rebase(data_dir, other_model)
    # The next versions of the new model: the last one before the active one is v0005, not v0002.
    for version in ("v0005", "v0006"):
        shutil.copytree(data_dir / "policies" / "v0004", data_dir / "policies" / version)
        store.policies.register(
            version, kind="full", state="candidate", parent_version="v0004", reference_version="v0004", round_id=None,
            reward_model_version=None, metrics={},
        )  # fmt: skip
        store.policies.activate(version, actor="learner")
    with learner_lease(store, data_dir, 5) as lease:
        assert lease
        assert prune(store, data_dir, 1, fence=lease) == ["v0001"]
    assert versions(data_dir) == ["v0000", "v0002", "v0003", "v0004", "v0005", "v0006"]
    with learner_lease(store, data_dir, 5) as lease:
        assert lease
        assert prune(store, data_dir, 0, fence=lease) == ["v0003"]


def test_before_a_servers_first_start_there_is_nothing_to_rebase(tmp_path: Path, other_model: Path) -> None:
    code, said = rebase(tmp_path, other_model)
    assert (code, "There is no data in" in said) == (1, True)

"""Manual decisions of an operator, and the removal of old versions."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from learner.cli import app
from learner.round.lease import learner_lease
from learner.round.retention import prune
from server.store.chats.records import Generation, Span
from server.store.store import Store
from tests.learner.rounds import make_version

runner = CliRunner()


def active(data_dir: Path) -> str:
    store = Store.open(data_dir)
    try:
        return store.policies.active().version
    finally:
        store.close()


def test_an_operator_promotes_a_rejected_version_and_rolls_back(data_dir: Path) -> None:
    make_version(data_dir, "v0001")
    result = runner.invoke(app, ["promote", "v0001", "--data-dir", str(data_dir), "--reason", "I read its answers"])
    assert (result.exit_code, active(data_dir)) == (0, "v0001")
    assert "v0001 is active instead of v0000; no server is running" in result.stdout
    result = runner.invoke(app, ["promote", "v0001", "--data-dir", str(data_dir)])
    assert "active already; nothing was changed" in result.stdout
    result = runner.invoke(app, ["rollback", "--data-dir", str(data_dir)])
    assert (result.exit_code, active(data_dir)) == (0, "v0000")
    store = Store.open(data_dir)
    back, there, _ = store.lineage.moves()
    store.close()
    assert (back.action, back.version, back.reason) == ("rollback", "v0000", "rolled back from v0001")
    assert (there.action, there.version, there.reason) == ("promote", "v0001", "I read its answers")
    assert there.actor.startswith("operator ")


def test_a_refused_manual_decision_is_one_sentence(data_dir: Path) -> None:
    def refused(*arguments: str) -> str:
        result = runner.invoke(app, [*arguments, "--data-dir", str(data_dir)])
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        return result.output

    assert "No version was active before v0000." in refused("rollback")
    assert "v0009" in refused("promote", "v0009")
    make_version(data_dir, "v0001")
    assert "never active" in refused("rollback", "v0001")
    with (data_dir / "policies" / "v0001" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert "does not have the SHA-256" in refused("promote", "v0001")
    assert active(data_dir) == "v0000"


def test_old_weights_are_deleted_and_their_records_stay(data_dir: Path) -> None:
    for number in range(1, 7):
        make_version(data_dir, f"v000{number}", "activate" if number in (1, 3) else None)
    derived = [data_dir / "merged" / folder / "v0002" for folder in ("bfloat16", "float32", ".")]
    for directory in derived:
        directory.mkdir(parents=True)
    store = Store.open(data_dir)
    with learner_lease(store, data_dir, 5) as lease:
        assert lease
        # Active v0003, before it v0001, the reference v0000; of the other four the newest two.
        assert prune(store, data_dir, 2, fence=lease) == ["v0004", "v0002"]
        # A learner that was killed between the mark and the deletion.
        (data_dir / "policies" / "v0002").mkdir()
        assert prune(store, data_dir, 2, fence=lease) == []
    kept = sorted(path.name for path in (data_dir / "policies").iterdir())
    assert kept == ["v0000", "v0001", "v0003", "v0005", "v0006"]
    assert not any(directory.exists() for directory in derived)
    assert store.policies.get("v0002").reason == "The win rate may be chance."
    store.close()
    result = runner.invoke(app, ["promote", "v0002", "--data-dir", str(data_dir)])
    assert "v0002 was pruned: its weights are gone." in result.output


def test_an_operator_sets_and_lifts_a_quarantine(data_dir: Path) -> None:
    def said(*arguments: str) -> str:
        result = runner.invoke(app, ["quarantine", *arguments, "--data-dir", str(data_dir)])
        assert "Traceback" not in result.output
        return f"{result.exit_code} {result.output.strip()}"

    assert said("anne") == "1 learner: There is no voter 'anne'."
    assert said("ann", "--lift") == "0 ann is not in quarantine."
    assert said("ann", "--reason", "a script") == (
        "0 ann is in quarantine: rounds that begin from now on leave 80 votes out."
    )
    assert said("ann") == "0 ann is in quarantine already; nothing was changed."
    shown = runner.invoke(app, ["status", "--data-dir", str(data_dir)]).stdout
    assert "quarantine  ann (the next round leaves their votes out)" in shown
    assert said("ann", "--lift") == "0 ann's 80 votes count again."
    store = Store.open(data_dir)
    events = store.quarantine.events("ann")
    store.close()
    assert [(event.action, event.reason) for event in events] == [("set", "a script"), ("lift", "")]
    assert all(event.actor.startswith("operator ") for event in events)


@pytest.mark.parametrize("arguments", [[], ["v0001", "--vote", "fb"]])
def test_trace_needs_a_version_or_a_vote(data_dir: Path, arguments: list[str]) -> None:
    result = runner.invoke(app, ["trace", *arguments, "--data-dir", str(data_dir)])
    assert (result.exit_code, "Give a version, or --vote" in result.output) == (1, True)


def test_status_shows_votes_on_versions_and_moves_of_the_pointer(data_dir: Path) -> None:
    make_version(data_dir, "v0001")
    runner.invoke(app, ["promote", "v0001", "--data-dir", str(data_dir), "--reason", "I read its answers"])
    store = Store.open(data_dir)
    for number, winner in enumerate(("v0001", "v0001", "v0000")):
        conversation = store.conversations.create(f"user{number}", "hello")
        comparison, *responses = store.responses.begin_comparison(
            f"user{number}", conversation, message="?", replica_id="r", policy_versions=("v0000", "v0001"),
            prompt_token_ids=[5], temperatures=(0.85, 0.85), max_tokens=3, seeds=(None, None),
        )  # fmt: skip
        for response, version in zip(responses, ("v0000", "v0001"), strict=True):
            store.responses.finish(response, Generation([7], [-0.5], "hi", "stop", [Span(0, 1, version)]))
        store.feedback.submit_choice(f"user{number}", comparison, "B" if winner == "v0001" else "A")
        store.feedback.submit_thumb(f"user{number}", responses[1], up=number > 0)
    store.close()
    shown = runner.invoke(app, ["status", "--data-dir", str(data_dir)]).stdout
    # 5/12 and 11/12.
    assert (
        "v0001 has 2 wins, 1 losses and 0 draws against v0000, several votes of each of the 4 who vote here; "
        "evidence that it is better 0.917, worse 0.417"
    ) in shown
    assert "v0001: 2 of 3 up; v0000: 0 of 0 up. From different users and questions, not blind" in shown
    assert "v0001 for v0000 by operator" in shown
    assert "I read its answers" in shown

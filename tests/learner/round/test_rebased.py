"""Rounds after the model was changed: they learn from the other model's votes, and go back to its lineage."""

import json
from pathlib import Path
from typing import Any

import pytest

import learner.ops.users as users
import learner.round.alignment.signal_stage as signal_stage
import learner.round.alignment.votes_stage as votes_stage
import learner.round.gate.gate_stage as judging
from learner.model.features import TokenPair
from learner.ops.manual_decisions import rollback
from learner.ops.rebase import rebase
from learner.ops.status import status
from learner.ops.users import read_users
from learner.reward.dataset import Dataset, to_dataset
from learner.round.workspace import Workspace
from server.store.files.manifest import verify
from server.store.learning.round_metrics import RoundMetrics, VoteCounts
from server.store.store import Store
from tests.learner.rounds import passing, run, settings
from tests.words import NUMBERS

pytestmark = pytest.mark.usefixtures("engine")


@pytest.fixture(autouse=True)
def promoting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> list[Dataset]:
    """Every dataset that is made."""
    made: list[Dataset] = []

    def keep(*arguments: Any) -> Dataset:
        made.append(to_dataset(*arguments))
        return made[-1]

    monkeypatch.setattr(votes_stage, "to_dataset", keep)
    monkeypatch.setattr(users, "to_dataset", keep)
    return made


def read_as_text(store: Store) -> list[TokenPair]:
    """The answers that were voted on, as the other tokenizer writes `ask question N answer` and their numbers."""
    found = []
    for number, vote in enumerate(store.snapshots.take().choices):
        for response in (vote.a, vote.b):
            answer = [NUMBERS + int(word) for word in response.text.split()]
            end = [2] if response.finish_reason == "stop" else []
            found.append(([1, 4, NUMBERS + number, 3], [*answer, *end]))
    return found


def change_model(data_dir: Path, model: Path) -> None:
    rebase(settings(data_dir), str(model), "", lambda line: None)


def votes(report: Any) -> tuple[int, int, int]:
    counts: VoteCounts = report.metrics.votes
    return counts.choices, counts.train + counts.judge, counts.left_out


def asked_ids(data_dir: Path, report: Any) -> list[list[int]]:
    """Prompts of users that the gate's versions answered."""
    lines = (data_dir / "rounds" / str(report.round_id) / "answers.jsonl").read_text().splitlines()
    return [line["prompt_token_ids"] for line in map(json.loads, lines) if line["conversation_id"]]


def new_votes(data_dir: Path) -> int:
    found: int = status(data_dir, 10, 10)["new_votes"]
    return found


def test_a_round_of_another_model_learns_from_all_votes_and_the_way_back_does_too(
    data_dir: Path, other_model: Path, datasets: list[Dataset]
) -> None:
    store = Store.open(data_dir)
    assert run(data_dir).policy_version == "v0001"
    assert new_votes(data_dir) == 0
    change_model(data_dir, other_model)
    # No vote came, but all are new to this model.
    assert new_votes(data_dir) == 80
    report = run(data_dir)
    assert (report.state, report.incumbent_version, report.policy_version) == ("promoted", "v0002", "v0003")
    assert votes(report) == (80, 80, 0)
    assert datasets[-1].answers == read_as_text(store)
    assert (report.metrics.prompts.train + report.metrics.prompts.held_out, report.metrics.prompts.own) == (80, 0)
    manifest = verify(data_dir / "policies" / "v0003")
    assert (manifest.kind, manifest.base_version, manifest.reference_version) == ("adapter", "v0002", "v0002")
    policy, [model, _] = store.policies.get("v0003"), store.reward_models.all()
    assert (policy.parent_version, policy.reference_version) == ("v0002", "v0002")
    assert (model.version, model.reference_version) == ("rm0002", "v0002")
    # `ask question N answer`, as the other tokenizer writes it.
    for token_ids in asked_ids(data_dir, report):
        assert token_ids[:2] + token_ids[3:] == [1, 4, 3]
        assert NUMBERS <= token_ids[2] < NUMBERS + 80
    assert (run(data_dir).state, new_votes(data_dir)) == ("nothing", 0)

    assert rollback(settings(data_dir), "v0001").startswith("v0001 is active instead of v0003. No server is running: ")
    # This model's round has learned from these votes.
    assert (run(data_dir).state, new_votes(data_dir)) == ("nothing", 0)
    [conversation, *_] = [prompt.conversation_id for prompt in store.snapshots.prompts()]
    store.feedback.submit_choice("ann", comparison_in(store, conversation), "BOTH_BAD")
    assert new_votes(data_dir) == 1
    back = run(data_dir)
    assert (back.state, back.incumbent_version, back.policy_version) == ("promoted", "v0001", "v0004")
    assert votes(back) == (80, 80, 0)
    manifest = verify(data_dir / "policies" / "v0004")
    assert (manifest.base_version, manifest.reference_version) == ("v0000", "v0000")
    stored = {tuple(prompt.token_ids) for prompt in store.snapshots.prompts()}
    assert {tuple(token_ids) for token_ids in asked_ids(data_dir, back)} <= stored
    store.close()


def comparison_in(store: Store, conversation: str) -> str:
    [turn] = store.conversations.turns("ann", conversation)
    assert turn.comparison
    return turn.comparison.id


@pytest.mark.parametrize("stage", ["snapshot", "improve", "publish"])
def test_a_stopped_round_of_the_model_before_is_given_up(
    data_dir: Path, other_model: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Workspace.record

    def stopped(self: Workspace, finished: str, metrics: RoundMetrics | None = None) -> None:
        record(self, finished, metrics)
        if finished == stage:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "record", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(data_dir)
    said = rebase(settings(data_dir), str(other_model), "", lambda line: None)
    store = Store.open(data_dir)
    [old] = store.rounds.page()
    assert said.endswith(f" {old.id}, which was stopped, will be given up.")
    reference = store.policies.active().version
    report = run(data_dir)
    assert report.round_id != old.id
    assert (report.state, store.policies.get(str(report.policy_version)).reference_version) == ("promoted", reference)
    old = store.rounds.get(old.id)
    assert (old.state, old.reason) == (
        "failed", f"It trains on v0000, and {reference} of another reference is active since.",
    )  # fmt: skip
    store.close()


def test_each_model_has_an_error_of_its_own_for_the_signal_test(
    data_dir: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    open_test = signal_stage.open_test

    def spy(rounds: list[Any]) -> Any:
        asked.append([one.reference_version for one in rounds])
        return open_test(rounds)

    monkeypatch.setattr(signal_stage, "open_test", spy)
    run(data_dir)
    change_model(data_dir, other_model)
    run(data_dir)
    assert asked == [[], []]


def test_the_users_command_reads_the_votes_as_the_new_model_does(
    data_dir: Path, other_model: Path, datasets: list[Dataset]
) -> None:
    change_model(data_dir, other_model)
    [ann] = read_users(settings(data_dir))
    store = Store.open(data_dir)
    assert [dataset.answers for dataset in datasets] == [read_as_text(store)] * 2
    store.close()
    assert (ann.user, ann.votes["choices"], ann.weight_share) == ("ann", 80, 1.0)

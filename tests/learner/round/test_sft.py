"""Whole rounds that learn from demonstrations, on a tiny model without vLLM."""

import math
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import learner.round.gate.gate_stage as judging
from learner.gate.rules import broken_rules_of_reference
from learner.improve.budget import Budget
from learner.improve.sft.trainer import FineTuning
from learner.ops.manual_decisions import promote, rollback
from learner.ops.report_page.report_page import write_report
from learner.ops.status import status
from learner.ops.trace import trace_version, trace_vote
from learner.progress import Stages
from learner.round.report import Report, rows
from learner.round.run import run_once
from learner.round.sft.due import due
from learner.round.sft.examples_stage import read_examples
from learner.settings import GateSettings
from server.shared.model.text import ChatText
from server.store.files.manifest import read_manifest, verify
from server.store.learning.round_metrics import AnswerHealth, CandidateMetrics, WinRate
from server.store.store import Store
from tests.learner.conftest import EOS
from tests.learner.rounds import passing, run, settings
from tests.round_metrics import filled

pytestmark = pytest.mark.usefixtures("engine")

SFT = {"learning_rate": 3e-3, "epochs": 4}


def opened(data_dir: Path) -> closing[Store]:
    return closing(Store.open(data_dir))


def demonstrate(data_dir: Path, count: int, first: int = 0, user: str = "bob") -> list[str]:
    """Demonstrates one style, to different questions; returns the feedback ids."""
    with opened(data_dir) as store:
        return [
            store.feedback.submit_demonstration(
                user,
                [
                    {"role": "user", "content": f"w{3 + number % 20} w{4 + number % 19} w{5 + number // 20}"},
                    {"role": "assistant", "content": "w7 w8 w9"},
                ],
            ).id
            for number in range(first, first + count)
        ]


def fine_tune(data_dir: Path, **changes: Any) -> Report:
    return run_once(settings(data_dir, **{"sft": SFT, **changes}), Stages(Console(quiet=True)), kind="sft")


@pytest.fixture
def without_votes(data_dir: Path) -> Path:
    """People asked questions, and took all votes back."""
    with opened(data_dir) as store:
        for vote in store.feedback.page("ann", 100):
            store.feedback.retract("ann", vote.id)
    return data_dir


def test_demonstrations_make_a_new_reference(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By how much the loss falls depends on which two are held out, and that on their ids.
    numbers = count()
    monkeypatch.setattr("server.store.chats.feedback.new_id", lambda prefix: f"{prefix}_{next(numbers):024x}")
    ids = demonstrate(data_dir, 10)
    report = fine_tune(data_dir)
    assert (report.state, report.policy_version) == ("promoted", "v0001"), report.sentence
    found, gate = report.metrics.sft, report.metrics.gate
    assert found is not None
    assert gate is not None
    assert found.carries_over
    assert (found.demonstrations, found.corrections, found.left_out, found.users, found.length) == (10, 0, 0, 1, 4.0)
    assert found.after < 0.8 * found.before
    assert (len(found.epochs), found.epochs[0].number) == (5, 0)
    assert 0 < found.fall_low < found.before - found.after
    # There are votes, so a judge compared it with what serves.
    assert gate.chosen.against_incumbent.prompts == 12
    manifest = verify(data_dir / "policies" / "v0001")
    assert (manifest.kind, manifest.reference_version, manifest.base_version) == ("full", "v0001", "v0001")
    original = read_manifest(data_dir / "policies" / "v0000").info["model"]
    assert (manifest.info["model"], manifest.info["round_id"]) == (original, report.round_id)
    assert (data_dir / "policies" / "v0001" / "tokenizer.json").exists()
    with opened(data_dir) as store:
        [round_] = store.rounds.page()
        version = store.policies.active()
        assert (round_.kind, round_.reference_version) == ("sft", "v0000")
        assert (version.version, version.reference_version, version.origin_version) == ("v0001", "v0001", "v0000")
        assert version.parent_version == "v0000"
        sides = store.lineage.round_votes(round_.id)
        assert sorted(sides[one] for one in ids) == ["judge"] * 2 + ["train"] * 8
        assert store.lineage.imitated("v0001") == {one for one in ids if sides[one] == "train"}
    assert not [path for path in (data_dir / "rounds" / round_.id).glob("st*") if path.is_dir()]
    said = dict(rows(report))
    assert said["imitated"] == "10 demonstrations, 0 corrections"
    assert said["loss, held out"].startswith(f"{found.before:.3f} -> {found.after:.3f} nats per token, a fall")
    assert "Loss on examples held out" in write_report(data_dir).read_text()


def test_rounds_after_it_start_from_it(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    ids = demonstrate(data_dir, 10)
    assert fine_tune(data_dir).state == "promoted"
    # All votes are new to another reference.
    report = run(data_dir)
    assert (report.state, report.policy_version) == ("promoted", "v0002"), report.sentence
    assert read_manifest(data_dir / "policies" / "v0002").base_version == "v0001"
    assert report.metrics.improvement is not None
    # The KL is from the new reference, where it starts.
    assert report.metrics.improvement.steps[0].kl == pytest.approx(0.0, abs=1e-3)
    # And once more from that: v0003 is fine-tuned from the adapter, and merges it.
    demonstrate(data_dir, 4, first=10)
    again = fine_tune(data_dir)
    assert (again.state, again.policy_version, again.incumbent_version) == ("promoted", "v0003", "v0002")
    with opened(data_dir) as store:
        version = store.policies.active()
        assert (version.reference_version, version.parent_version, version.origin_version) == (
            "v0003",
            "v0002",
            "v0000",
        )
        rounds = store.rounds.page()
        # What was trained on before is not held out now.
        first, second = (store.lineage.round_votes(one.id) for one in (rounds[-1], rounds[0]))
        trained = {one for one in ids if first[one] == "train"}
        assert len(trained) == 8
        assert all(second[one] == "train" for one in trained)
        assert [rounds[0].kind, rounds[1].kind, rounds[2].kind] == ["sft", "alignment", "sft"]
        # Lineage goes both ways: to all that was made from a demonstration, and from a version to its votes.
        assert store.lineage.carriers([rounds[-1].id]) == {"v0001": "retired", "v0002": "retired", "v0003": "active"}
        assert store.lineage.carriers([rounds[1].id]) == {"v0002": "retired", "v0003": "active"}
        assert store.deletion.look("bob").policy_versions == ["v0001", "v0002", "v0003"]
    made = trace_version(data_dir, "v0003").record["made_by"]
    assert [step["version"] for step in made] == ["v0003", "v0002", "v0001"]
    [step] = trace_vote(data_dir, next(iter(trained))).record["rounds"][:1]
    assert step["versions"] == {"v0001": "retired", "v0002": "retired", "v0003": "active"}


def test_one_goes_back_across_a_fine_tuned_reference(data_dir: Path) -> None:
    demonstrate(data_dir, 10)
    assert fine_tune(data_dir).state == "promoted"
    assert rollback(settings(data_dir)).startswith("v0000 is active instead of v0001; no server is running")
    # Nothing is imitated again by itself, but by the command; with new demonstrations, all of them.
    with opened(data_dir) as store:
        assert not due(store, 2)
    demonstrate(data_dir, 2, first=10)
    report = fine_tune(data_dir)
    assert (report.state, report.policy_version, report.incumbent_version) == ("promoted", "v0002", "v0000")
    assert report.metrics.sft is not None
    assert report.metrics.sft.demonstrations == 12


def test_enough_new_demonstrations_of_several_people_are_due(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(data_dir) as store:
        assert not due(store, 10)
        demonstrate(data_dir, 30)
        # One person alone does not change the reference without an operator.
        assert not due(store, 20)
        demonstrate(data_dir, 9, user="eve")
        assert not due(store, 20)
        said = dict(status(data_dir, 10, 10)["lines"])
        assert said["to imitate"] == "39 new demonstrations and corrections, for `learner sft`"
        demonstrate(data_dir, 1, first=9, user="eve")
        assert due(store, 20)
        assert not due(store, 0)
        store.quarantine.set("eve", actor="operator", reason="")
        assert not due(store, 20)
        store.quarantine.lift("eve", actor="operator", reason="")
        assert fine_tune(data_dir).state == "promoted"
        assert not due(store, 20)
        assert dict(status(data_dir, 10, 10)["lines"])["imitated"].endswith(
            "(promoted): v0001 is active instead of v0000; no server is running, so the next one to start will load it."
        )
    # New demonstrations are no new votes, so votes are not learned from again.
    monkeypatch.setattr(judging, "decide", passing)
    assert run(data_dir).policy_version == "v0002"
    demonstrate(data_dir, 3, first=40)
    assert "no new votes" in run(data_dir).sentence


def test_a_round_that_failed_is_not_due_again(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would keep the votes from being learned from for ever."""
    demonstrate(data_dir, 10)
    demonstrate(data_dir, 10, first=10, user="eve")
    monkeypatch.setattr(FineTuning, "run", lambda _: 1 / 0)
    with opened(data_dir) as store:
        assert due(store, 20)
        with pytest.raises(ZeroDivisionError):
            fine_tune(data_dir)
        assert not due(store, 20)


def test_without_votes_there_is_no_judge_and_none_is_needed(without_votes: Path) -> None:
    demonstrate(without_votes, 10)
    report = fine_tune(without_votes)
    assert (report.state, report.policy_version) == ("promoted", "v0001"), report.sentence
    gate = report.metrics.gate
    assert gate is not None
    assert math.isnan(gate.chosen.against_incumbent.rate)
    assert dict(rows(report))["win rate"] == "unknown: there are too few votes to judge by"


def test_why_nothing_is_imitated(without_votes: Path) -> None:
    assert fine_tune(without_votes).sentence == "There are no demonstrations or corrections yet; nothing was changed."
    demonstrate(without_votes, 5)
    report = fine_tune(without_votes)
    assert (report.state, report.sentence) == (
        "rejected",
        "There are 3 demonstrations and corrections to train on and 2 held out, and at least 4 and 2 of different "
        "topics are needed. Nothing was changed.",
    )
    demonstrate(without_votes, 10, first=5)
    with opened(without_votes) as store:
        store.quarantine.set("bob", actor="operator", reason="")
    assert fine_tune(without_votes).sentence == "There are no demonstrations or corrections yet; nothing was changed."


def test_what_does_not_carry_over_is_not_published(without_votes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrate(without_votes, 10)
    losses = iter([[4.0, 8.0], [6.0, 7.0], [4.0, 9.0], [4.0, 8.0], [1.0, 9.0], [3.0, 8.5], [2.0, 9.0]])
    monkeypatch.setattr(FineTuning, "held_out_losses", lambda _: torch.tensor(next(losses)))
    report = fine_tune(without_votes)
    assert (report.state, report.policy_version) == ("rejected", None)
    assert report.sentence == (
        "The loss on the 2 demonstrations and corrections held out did not fall: what the others show does not carry "
        "over to them. Nothing was changed."
    )
    # An operator may try again, with other settings, say. Now it falls on one of two, and rises on the other.
    report = fine_tune(without_votes)
    assert (report.state, report.policy_version) == ("rejected", None)
    assert report.sentence == (
        "The loss on the 2 demonstrations and corrections held out may have fallen by chance: 1.500 -> 1.250 nats per "
        "token, a fall of at least -0.250. Nothing was changed."
    )
    with opened(without_votes) as store:
        assert [one.version for one in store.policies.page()] == ["v0000"]


def test_an_operators_checks_hold_for_it_too(without_votes: Path, tmp_path: Path) -> None:
    checks = tmp_path / "checks.jsonl"
    checks.write_text('{"prompt": "w3 w4", "must": ["never said"]}\n')
    demonstrate(without_votes, 10)
    report = fine_tune(without_votes, checks={"file": checks})
    assert (report.state, report.policy_version) == ("rejected", "v0001")
    assert "It fails 1 of 1 checks" in report.sentence
    with opened(without_votes) as store:
        assert store.policies.active().version == "v0000"
        # A reference that was not promoted stands in nobody's way.
        assert store.policies.get("v0001").origin_version == "v0000"


def test_a_stopped_round_of_the_other_kind_comes_first(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("learner.round.alignment.stages.improve_policy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(data_dir)
    demonstrate(data_dir, 10)
    report = fine_tune(data_dir)
    assert report.state == "nothing"
    assert report.sentence.endswith("was stopped: `learner run-once` finishes it first. Nothing was changed.")
    with opened(data_dir) as store:
        [round_] = store.rounds.page()
        assert (round_.state, round_.attempts) == ("running", 0)
        assert not due(store, 1)


@pytest.mark.slow
def test_a_round_on_the_reference_before_is_given_up(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator goes back while it is stopped."""
    demonstrate(data_dir, 10)
    assert fine_tune(data_dir).state == "promoted"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("learner.round.alignment.stages.improve_policy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(data_dir)
    rollback(settings(data_dir))
    monkeypatch.setattr(judging, "decide", passing)
    assert run(data_dir).state == "promoted"
    with opened(data_dir) as store:
        given_up = store.rounds.page()[1]
        assert given_up.reason == "It trains on v0001, and v0000 of another reference is active since."


@pytest.mark.slow
def test_an_adapter_keeps_its_size_and_its_scale(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the settings say by now: the round goes on from what is served."""
    monkeypatch.setattr(judging, "decide", passing)
    assert run(data_dir, policy={"lora_rank": 4, "lora_alpha": 8, "kl_per_token": 10.0}).policy_version == "v0001"
    demonstrate(data_dir, 10)
    assert fine_tune(data_dir, policy={"lora_rank": 8, "lora_alpha": 64}).state == "promoted"
    with opened(data_dir) as store:
        policy = store.rounds.page()[0].settings["policy"]
        assert (policy["lora_rank"], policy["lora_alpha"], policy["start_from"]) == (4, 8, "active")


def test_a_version_that_loses_for_certain_is_not_promoted(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrate(data_dir, 10)
    worse = WinRate(0.3, 0.2, 0.4, 12)
    monkeypatch.setattr(judging, "win_rate", lambda *_: worse)
    report = fine_tune(data_dir)
    assert (report.state, report.policy_version) == ("rejected", "v0001")
    assert "It loses to the incumbent: 0.30 [0.20, 0.40]." in report.sentence
    # What an operator promotes all the same was trained on its examples.
    assert promote(settings(data_dir), "v0001").startswith("v0001 is active")
    with opened(data_dir) as store:
        assert len(store.lineage.imitated("v0001")) == 8
        assert store.lineage.imitated("v0000") == set()


@pytest.mark.slow
def test_what_dpo_was_trained_on_is_not_held_out(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    dpo = {"improver": "dpo", "dpo": {"steps": 2, "episodes": 16, "votes": 16, "learning_rate": 3e-3}}
    assert run(data_dir, **dpo).policy_version == "v0001"
    with opened(data_dir) as store:
        sides = store.lineage.round_votes(store.rounds.page()[0].id)
        assert store.lineage.imitated("v0001") == {vote for vote, side in sides.items() if side == "train"}


@pytest.mark.slow
def test_a_round_whose_examples_went_while_it_waited_ends_as_it_was(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the pointer moved; then people are forgotten."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    demonstrate(data_dir, 10)
    with monkeypatch.context() as patch:
        patch.setattr("learner.round.publish.wait_until_loaded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(data_dir)
    with opened(data_dir) as store:
        while store.deletion.step("bob"):
            pass
    assert fine_tune(data_dir).state == "promoted"


@pytest.mark.slow
def test_an_adapter_cannot_be_continued_in_full(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    assert run(data_dir).policy_version == "v0001"
    demonstrate(data_dir, 10)
    report = fine_tune(data_dir, policy={"train": "full"})
    assert report.sentence == (
        "The active v0001 is of the kind adapter, but policy.train is full: change policy.train. Nothing was changed."
    )


@pytest.mark.slow
def test_all_weights_can_be_fine_tuned(without_votes: Path) -> None:
    demonstrate(without_votes, 10)
    report = fine_tune(without_votes, policy={"train": "full"}, sft={"learning_rate": 3e-4, "epochs": 4})
    assert (report.state, report.policy_version) == ("promoted", "v0001"), report.sentence
    assert verify(without_votes / "policies" / "v0001").kind == "full"


@pytest.mark.slow
def test_it_takes_no_workers(without_votes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is planned for one process, and neither GPUs nor a cluster are asked for."""
    monkeypatch.setattr("learner.round.run.check_workers", None)
    demonstrate(without_votes, 10)
    assert fine_tune(without_votes, workers={"count": 2}).state == "promoted"
    with opened(without_votes) as store:
        [round_] = store.rounds.page()
    assert round_.settings["workers"]["count"] == 0


def test_it_is_fine_tuned_in_bfloat16_too(without_votes: Path) -> None:
    demonstrate(without_votes, 10)
    report = fine_tune(without_votes, dtype="bfloat16")
    assert (report.state, report.policy_version) == ("promoted", "v0001"), report.sentence
    [weights] = (without_votes / "policies" / "v0001").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}


def test_the_first_published_version_is_not_held_to_another_references_kl(data_dir: Path) -> None:
    """The KL that its gate measured is from the reference before."""
    demonstrate(data_dir, 10)
    assert fine_tune(data_dir).state == "promoted"
    with opened(data_dir) as store:
        assert store.policies.active().metrics["kl"] > 1.0
    report = run(data_dir)
    assert report.metrics.improvement is not None
    assert report.metrics.improvement.kl_budget == Budget.after(0.0, settings(data_dir).policy).kl


def test_a_demonstration_begins_with_the_services_system_prompt(data_dir: Path, model_directory: Path) -> None:
    demonstrate(data_dir, 1)
    with opened(data_dir) as store:
        own = [{"role": "system", "content": "w8"}, {"role": "user", "content": "w4"}]
        store.feedback.submit_demonstration("bob", [*own, {"role": "assistant", "content": "w7"}])
        snapshot = store.snapshots.take()
    text = ChatText.load(model_directory)
    read = [one.tokens for one in read_examples(snapshot, text, 100, settings(data_dir, system_prompt="w9"))]
    assert read == [([1, 9, 1, 3, 4, 5, 3], [7, 8, 9, EOS]), ([1, 8, 1, 4, 3], [7, EOS])]


def judged(length: float, high: float = 0.6, empty: float = 0.0, repetition: float = 0.0) -> Any:
    health = AnswerHealth(length=length, empty=empty, ended=1.0, repetition=repetition)
    rate = WinRate(0.5, 0.4, high, 32)
    return replace(
        filled(CandidateMetrics), health=health, against_incumbent=rate, against_reference=rate, against_best=None
    )


@pytest.mark.parametrize(
    ("figures", "reasons"),
    [
        (judged(10.0), []),
        (judged(4.0), ["Answers have 4 tokens, outside 5 to 80."]),
        (judged(90.0), ["Answers have 90 tokens, outside 5 to 80."]),
        (judged(20.0, empty=0.5), ["50% of the answers are empty (incumbent: 0%)."]),
        (judged(20.0, repetition=0.5), ["50% of the 4-grams are repeated (incumbent: 10%)."]),
    ],
)
def test_answers_may_be_as_short_as_those_that_were_shown(figures: Any, reasons: list[str]) -> None:
    incumbent = AnswerHealth(length=40.0, empty=0.0, ended=1.0, repetition=0.1)
    assert broken_rules_of_reference(figures, incumbent, 20.0, GateSettings()) == reasons


def test_it_may_not_lose_for_certain() -> None:
    incumbent = AnswerHealth(length=40.0, empty=0.0, ended=1.0, repetition=0.1)
    reasons = broken_rules_of_reference(judged(20.0, high=0.49), incumbent, 20.0, GateSettings())
    assert [reason.split(":")[0] for reason in reasons] == ["It loses to the incumbent", "It loses to the reference"]


def test_a_deleted_user_is_named_in_what_their_demonstrations_made(data_dir: Path) -> None:
    demonstrate(data_dir, 10)
    assert fine_tune(data_dir).state == "promoted"
    with opened(data_dir) as store:
        assert store.deletion.look("bob").policy_versions == ["v0001"]
        while store.deletion.step("bob"):
            pass
        assert store.snapshots.take().demonstrations == []
    assert fine_tune(data_dir).sentence == "There are no demonstrations or corrections yet; nothing was changed."


@pytest.mark.slow
def test_a_reference_that_nothing_needs_is_pruned(data_dir: Path) -> None:
    for number in range(4):
        demonstrate(data_dir, 6, first=6 * number)
        report = fine_tune(data_dir, keep_versions=1)
        assert report.policy_version == f"v000{number + 1}", report.sentence
    left = sorted(path.name for path in (data_dir / "policies").iterdir())
    # What was made from the model, the active one, and the one before it, which is the one to keep.
    assert left == ["v0000", "v0002", "v0003", "v0004"]

"""A whole round on a tiny model and a real store; only the engine is a stand-in, sampling by transformers."""

import json
import pickle
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

import learner.round.alignment.stages as alignment
import learner.round.gate.gate_stage as judging
import learner.round.lease
import tests.learner.rounds as rounds_fixture
from learner.gate.rules import Verdict
from learner.improve.ppo.trainer import PPO
from learner.model.forward import Tokens, token_logprobs
from learner.ops.report_page.report_page import write_report
from learner.ops.status import status
from learner.ops.trace import trace_version, trace_vote
from learner.progress import Stages
from learner.round.gate.gate_stage import confirm
from learner.round.publish import wait_until_loaded
from learner.round.report import print_report
from learner.round.run import run_once
from learner.round.workspace import STAGES, Workspace
from server.shared.errors import ConflictError
from server.store.files.manifest import verify
from server.store.learning.round_metrics import RoundMetrics, SignalTest, VoterWeights, WinRate
from server.store.store import Store
from tests.learner.rounds import TinyEngine, low_words, make_reference, make_version, passing, run, settings, vote
from tests.round_metrics import filled

pytestmark = pytest.mark.usefixtures("engine")


def opened(data_dir: Path) -> Store:
    return Store.open(data_dir)


def test_nothing_to_learn_is_a_sentence_and_changes_nothing(tmp_path: Path, model_directory: Path) -> None:
    assert "no data" in run(tmp_path / "nowhere").sentence
    assert not (tmp_path / "nowhere").exists()
    data_dir = tmp_path / "data"
    opened(data_dir).close()
    assert "no policy yet" in run(data_dir).sentence
    make_reference(data_dir, model_directory)
    assert "no votes yet" in run(data_dir).sentence
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    store = opened(data_dir)
    vote(store, model, 5, low_words)
    assert "5 votes, fewer than the 40" in run(data_dir).sentence
    assert "and 10 are needed" in run(data_dir, min_votes=5).sentence
    assert store.rounds.page() == []
    assert [p.version for p in store.policies.page()] == ["v0000"]


def test_pi_theta_starts_as_pi_old_even_if_other_rows_affect_a_row(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Large matrices do this in bfloat16; a tiny model's are too small.
    def rounded(model: Any, hidden: Tensor, tokens: Tokens, temperature: float) -> Tensor:
        return token_logprobs(model, hidden, tokens, temperature) + 1e-3 * len(tokens) * tokens.response_mask

    monkeypatch.setattr("learner.model.forward.token_logprobs", rounded)
    monkeypatch.setattr("learner.model.passes.token_logprobs", rounded)
    monkeypatch.setattr(judging, "decide", passing)
    steps = run(data_dir, dtype="bfloat16").metrics.improvement.steps
    assert [step.first_ratio_error for step in steps] == [0.0, 0.0]
    assert steps[0].kl == 0.0


def test_a_promoted_round(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    report = run(data_dir)
    assert report.state == "promoted"
    assert report.policy_version == "v0001"
    assert "v0001 is active instead of v0000; no server is running" in report.sentence
    manifest = verify(data_dir / "policies" / "v0001")
    assert (manifest.kind, manifest.base_version, manifest.reference_version) == ("adapter", "v0000", "v0000")
    assert verify(data_dir / "reward_models" / "rm0001")
    store = opened(data_dir)
    assert store.policies.active().version == "v0001"
    policy = store.policies.get("v0001")
    assert (policy.parent_version, policy.reward_model_version, policy.round_id) == ("v0000", "rm0001", report.round_id)
    stages = {"votes", "prompts", "versions", "signal", "voters", "reward_model", "improvement", "gate", "seconds"}
    assert set(report.metrics.to_json()) == stages
    # One voter cannot be compared with others.
    assert report.metrics.voters == VoterWeights(voters=1, doubted=0, mean_weight=1.0)
    first = report.metrics.improvement.steps[0]
    assert first.kl == pytest.approx(0, abs=1e-5)
    assert first.first_ratio_error < 1e-5
    # Of sixteen answers it may come out below nought; it is of another policy.
    assert abs(report.metrics.improvement.steps[1].kl) > 1e-4
    assert list((data_dir / "rounds" / str(report.round_id)).glob("events.out.tfevents*"))
    assert json.loads((data_dir / "rounds" / str(report.round_id) / "report.json").read_text())["state"] == "promoted"

    page = write_report(data_dir)
    text = page.read_text()
    assert text.count('<svg class="chart"') == 8
    assert "Held-out prompts, before and after" in text
    # The prompts as readable text, and the incumbent's answers beside the chosen candidate's.
    line = json.loads((page.parent / "answers.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == " ".join(f"w{token}" for token in line["prompt_token_ids"])
    for said in (line["prompt"], line["incumbent"]["text"], line["step 2"]["text"]):
        assert said in text

    again = run(data_dir)
    assert again.state == "nothing"
    assert "no new votes" in again.sentence
    found = status(data_dir, 10, 10)
    assert (found["active_version"], found["votes"], found["new_votes"]) == ("v0001", 80, 0)

    console = Console(record=True, width=100, quiet=False, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    print_report(report, console)
    table = console.export_text()
    for word in ("votes used", "longer wins", "reward", "KL", "win rate", "seconds", "v0001 is active"):
        assert word in table


def test_the_next_round_meets_the_promoted_version(
    data_dir: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(judging, "decide", passing)
    run(data_dir)
    store = opened(data_dir)
    vote(store, AutoModelForCausalLM.from_pretrained(model_directory).eval(), 60, low_words, seed=1)
    assert status(data_dir, 10, 10)["new_votes"] == 60
    report = run(data_dir)
    assert (report.state, report.incumbent_version, report.policy_version) == ("promoted", "v0001", "v0002")
    assert store.policies.get("v0002").parent_version == "v0001"
    # The incumbent's answers are its own, not the reference's.
    lines = (data_dir / "rounds" / str(report.round_id) / "answers.jsonl").read_text().splitlines()
    assert any(answers["incumbent"] != answers["reference"] for answers in map(json.loads, lines))


def test_the_next_round_may_start_from_the_active_version(
    data_dir: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(judging, "decide", passing)
    run(data_dir)
    vote(opened(data_dir), AutoModelForCausalLM.from_pretrained(model_directory).eval(), 60, low_words, seed=1)
    shutil.copytree(data_dir, data_dir.with_name("other"))
    active = settings(data_dir).policy.model_copy(update={"start_from": "active"})
    report = run(data_dir, policy=active)
    assert report.state == "promoted"
    # It starts at the active version, away from the reference.
    assert report.metrics.improvement.steps[0].kl > 1e-4
    # Training of all weights cannot start from an adapter; this is an error.
    full = active.model_copy(update={"train": "full"})
    with pytest.raises(ValueError, match="v0001 is of the kind adapter"):
        run(data_dir.with_name("other"), policy=full)
    assert opened(data_dir.with_name("other")).rounds.page()[0].state == "failed"


def test_answers_that_never_end_do_not_break_the_figures(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    monkeypatch.setattr(rounds_fixture, "EOS", -1)
    report = run(data_dir, ppo=settings(data_dir).ppo.model_copy(update={"missing_eos_score": -1.0}))
    assert report.state == "promoted"
    assert [step.ended for step in report.metrics.improvement.steps] == [0, 0]
    assert all(isinstance(step.score, float) for step in report.metrics.improvement.steps)
    print_report(report, Console(quiet=True))
    assert write_report(data_dir).read_text().count('<svg class="chart"') == 8


def test_files_of_a_failed_round_are_removed(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(judging, "decide", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        run(data_dir)
    [directory] = (data_dir / "rounds").iterdir()
    assert [path.name for path in directory.iterdir() if path.is_dir()] == []


def test_another_seed_gives_another_round(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    shutil.copytree(data_dir, tmp_path / "other")
    gate = settings(data_dir).gate.model_copy(update={"signal_p": 1.0})
    first, other = run(data_dir, gate=gate), run(tmp_path / "other", seed=1, gate=gate)
    # Of the reference's answers, so it depends on nothing but their draw.
    assert first.metrics.improvement.steps[0].entropy != other.metrics.improvement.steps[0].entropy
    assert opened(tmp_path / "other").rounds.page()[0].settings["seed"] == 1


@pytest.mark.parametrize(("keep", "left"), [(False, []), (True, ["step-001", "step-002"])])
def test_candidates_are_kept_if_that_is_set(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, left: list[str]
) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    report = run(data_dir, gate=settings(data_dir).gate.model_copy(update={"keep_candidates": keep}))
    found = (data_dir / "rounds" / str(report.round_id)).iterdir()
    assert sorted(path.name for path in found if path.is_dir()) == left


def test_few_prompts_are_topped_up_with_built_in_ones(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    report = run(data_dir, min_prompts=48)
    assert report.state == "promoted"
    prompts = report.metrics.prompts
    assert prompts.own == prompts.train + prompts.held_out - 80 > 0


def test_two_opponents_that_are_one_version_get_one_result(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    chosen = run(data_dir).metrics.gate.chosen
    assert chosen.against_incumbent == chosen.against_reference


# A step so large that a KL estimated on sixteen answers is certain to be positive.
LARGE = {"learning_rate": 3e-2}


@pytest.mark.parametrize("budget", [{"kl_budget": 1e-5}, {"kl_per_token": 1e-6}])
def test_a_policy_that_goes_over_the_budget_at_once_leaves_no_candidate(
    data_dir: Path, budget: dict[str, float]
) -> None:
    began = settings(data_dir)
    report = run(data_dir, policy=began.policy.model_copy(update=budget), ppo=began.ppo.model_copy(update=LARGE))
    assert report.state == "rejected"
    assert "ended at step 1 without a candidate: the KL exceeded its budget" in report.sentence
    assert report.policy_version is None


def test_updates_on_long_answers_are_smaller(data_dir: Path) -> None:
    began = settings(data_dir)
    report = run(
        data_dir,
        policy=began.policy.model_copy(update={"kl_budget": 1e-5}),
        ppo=began.ppo.model_copy(update={**LARGE, "full_step_tokens": 1e-12}),
    )
    assert report.metrics.improvement
    assert report.metrics.improvement.ended_by == "steps"


def test_full_fine_tuning_publishes_all_weights(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    began = settings(data_dir)
    report = run(
        data_dir,
        policy=began.policy.model_copy(update={"train": "full"}),
        ppo=began.ppo.model_copy(update={"learning_rate": 1e-4}),
    )
    assert report.state == "promoted"
    manifest = verify(data_dir / "policies" / "v0001")
    assert (manifest.kind, manifest.base_version) == ("full", "v0001")
    assert "model.safetensors" in manifest.files
    assert "config.json" in manifest.files


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_a_round_killed_after_any_stage_resumes(data_dir: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    record = Workspace.record

    def killed(self: Workspace, finished: str, metrics: RoundMetrics | None = None) -> None:
        record(self, finished, metrics)
        if finished == stage:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data_dir)
    store = opened(data_dir)
    started = store.rounds.running()
    assert started is not None
    assert started.stage == stage
    assert store.policies.active().version == "v0000"
    report = run(data_dir)
    assert (report.state, report.round_id, report.policy_version) == ("promoted", started.id, "v0001")
    assert [p.version for p in store.policies.page()] == ["v0001", "v0000"]
    assert [m.version for m in store.reward_models.all()] == ["rm0001"]


def test_a_rejected_candidate_is_kept_with_the_reason_and_not_served(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "decide", lambda candidates, *_, **__: Verdict(candidates[-1], ["It is worse."]))
    report = run(data_dir)
    assert report.state == "rejected"
    assert "It is worse." in report.sentence
    store = opened(data_dir)
    assert store.policies.active().version == "v0000"
    policy = store.policies.get("v0001")
    assert (policy.state, policy.reason) == ("rejected", "It is worse.")
    assert verify(data_dir / "policies" / "v0001")


def test_votes_without_a_signal_end_the_round_before_training(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, engine: type[TinyEngine]
) -> None:
    weak = filled(SignalTest, accuracy=0.51, p_value=0.4, level=0.01, votes=80, conversations=80)
    monkeypatch.setattr(alignment, "test_signal", lambda *_: weak)
    monkeypatch.setattr(engine, "pushes", 0)
    report = run(data_dir)
    assert report.state == "rejected"
    assert "too little signal" in report.sentence
    assert report.policy_version is None
    # By the comparison of the engine with the trainer.
    assert engine.pushes == 2


def test_rounds_without_a_signal_share_one_error_and_say_how_many_votes_are_missing(
    tmp_path: Path, model_directory: Path, model: Any
) -> None:
    make_reference(tmp_path, model_directory)
    store = opened(tmp_path)
    chance = random.Random(2)
    gate = {"signal_p": 0.02}
    for count, user in ((60, "ann"), (20, "bob")):
        vote(store, model, count, lambda _: chance.random(), user=user)
        assert run(tmp_path, gate=gate).state == "rejected"
    second, first = (one.metrics.signal for one in store.rounds.page())
    assert first is not None
    assert second is not None
    assert (first.votes, first.first_votes, first.level) == (60, 60, 0.01)
    assert (second.votes, second.first_votes, second.level) == (80, 60, pytest.approx(0.0125))
    assert (len(first.spent), len(second.spent)) == (99, 124)
    missing = second.missing(80)
    assert [line for line in status(tmp_path, 10, 10)["lines"] if line[0] == "needs"] == (
        [("needs", f"about {missing} more votes as clear as those so far")] if missing else []
    )


def test_an_operators_rollback_meanwhile_is_not_overwritten(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*arguments: Any, **options: Any) -> Any:
        make_version(data_dir, "v0009", active="activate")
        return confirm(*arguments, **options)

    monkeypatch.setattr(judging, "decide", passing)
    # Not surely worse: then it would not be confirmed.
    monkeypatch.setattr(judging, "win_rate", lambda won, *_: WinRate(0.5, 0.4, 0.6, len(won.point)))
    monkeypatch.setattr(judging, "confirm", moved)
    report = run(data_dir)
    assert report.state == "rejected"
    assert "was changed in the meantime" in report.sentence
    assert opened(data_dir).policies.active().version == "v0009"


def test_a_round_that_raises_is_recorded_and_changes_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(PPO, "improve", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        run(data_dir)
    store = opened(data_dir)
    (failed,) = store.rounds.page()
    assert (failed.state, failed.reason) == ("failed", "RuntimeError: disk full")
    assert store.policies.active().version == "v0000"


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_round_that_is_asked_to_stop_is_resumed(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(PPO, "improve", interrupt)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                run(data_dir, max_resumes=1)
    store = opened(data_dir)
    (running,) = store.rounds.page()
    # A requested stop does not count as a crash, however often.
    assert (running.state, running.stage, running.attempts) == ("running", "reward_model", 0)
    monkeypatch.setattr(judging, "decide", passing)
    assert run(data_dir).round_id == running.id


def test_a_round_that_is_killed_too_often_is_given_up(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise SystemExit  # Like a kill: no handler runs.

    with monkeypatch.context() as killing:
        killing.setattr(PPO, "improve", killed)
        for _ in range(3):
            with pytest.raises(SystemExit):
                run(data_dir, max_resumes=2)
    monkeypatch.setattr(judging, "decide", passing)
    report = run(data_dir, max_resumes=2)
    new, given_up = opened(data_dir).rounds.page()
    assert given_up.state == "failed"
    assert given_up.reason == "It was killed 3 times, last after its stage reward_model."
    assert (report.state, report.round_id) == ("promoted", new.id)


def test_votes_are_traced_to_versions_and_back(
    data_dir: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(judging, "decide", passing)
    first = run(data_dir)
    store = opened(data_dir)
    vote(store, AutoModelForCausalLM.from_pretrained(model_directory).eval(), 20, low_words, seed=1)
    active = settings(data_dir).policy.model_copy(update={"start_from": "active"})
    second = run(data_dir, policy=active)
    made = trace_version(data_dir, "v0002").record["made_by"]
    assert [(step["version"], step["round_id"], step["start_from"]) for step in made] == [
        ("v0002", second.round_id, "active"),
        ("v0001", first.round_id, "reference"),
    ]
    sides = made[1]["votes"]
    metrics = first.metrics.votes
    assert (len(sides["train"]), len(sides["judge"])) == (metrics.train, metrics.judge)
    assert len({*sides["train"], *sides["judge"]}) == 80

    old = sides["train"][0]
    (newest,) = store.feedback.page("ann", 1)
    carried = trace_vote(data_dir, old)
    assert [(step["round_id"], list(step["versions"])) for step in carried.record["rounds"]] == [
        (first.round_id, ["v0001", "v0002"]),  # v0002 started from v0001.
        (second.round_id, ["v0002"]),
    ]
    assert any("trained rm0001: v0001 (retired), v0002 (active)" in line for line in carried.lines)
    assert [step["round_id"] for step in trace_vote(data_dir, newest.id).record["rounds"]] == [second.round_id]

    # A withdrawn vote is not learned from again, and the trace says so.
    store.feedback.retract("ann", old)
    third = run(data_dir)
    assert third.metrics.votes.choices == 99
    assert [step["round_id"] for step in trace_vote(data_dir, old).record["rounds"]] == [
        first.round_id,
        second.round_id,
    ]
    assert any("of these votes, since then: 1 retracted" in line for line in trace_version(data_dir, "v0001").lines)


def test_votes_on_rolled_back_versions_can_be_left_out(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(data_dir)
    for response in store.snapshots.take().choices[:30]:
        store._db.execute("UPDATE spans SET policy_version = 'v0009' WHERE response_id = ?", [response.a.id])
    shutil.copytree(data_dir / "policies" / "v0000", data_dir / "policies" / "v0009")
    store.policies.register(
        "v0009", kind="full", state="candidate", parent_version="v0000", reference_version="v0000", round_id=None,
        reward_model_version=None, metrics={},
    )  # fmt: skip
    store.policies.activate("v0009", actor="learner")
    store.policies.activate("v0000", actor="operator", action="rollback")
    shutil.copytree(data_dir, data_dir.with_name("other"))
    monkeypatch.setattr(judging, "decide", passing)
    assert run(data_dir, skip_rolled_back=True).metrics.votes.choices == 50
    assert run(data_dir.with_name("other")).metrics.votes.choices == 80


def test_users_in_quarantine_when_a_round_began_are_left_out(
    data_dir: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(judging, "decide", passing)
    store = opened(data_dir)
    vote(store, AutoModelForCausalLM.from_pretrained(model_directory).eval(), 30, low_words, seed=1, user="bob")
    store.quarantine.set("bob", actor="operator", reason="too fast")

    def killed(*_: Any) -> None:
        # An operator changes their mind while the round runs, and it is killed.
        store.quarantine.lift("bob", actor="operator", reason="")
        store.quarantine.set("ann", actor="operator", reason="")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(alignment, "improve_policy", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data_dir)
    report = run(data_dir)
    votes = report.metrics.votes
    assert (votes.choices, votes.quarantined) == (80, 30)
    learned = store.lineage.round_votes(str(report.round_id))
    assert {event.user for feedback_id in learned for event in store.lineage.events(feedback_id)} == {"ann"}
    console = Console(record=True, width=100, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    print_report(report, console)
    assert "30 votes of users in quarantine" in console.export_text()
    assert dict(status(data_dir, 10, 10)["lines"])["quarantine"] == (
        f"ann (the next round leaves their votes out); 30 votes were left out of {report.round_id}"
    )
    # A changed quarantine changes the votes: no vote is new, but there is something to learn.
    store.quarantine.lift("ann", actor="operator", reason="")
    again = run(data_dir)
    assert (again.metrics.votes.choices, again.metrics.votes.quarantined) == (110, 0)
    assert "no new votes" in run(data_dir).sentence


def test_one_learner_at_a_time(data_dir: Path) -> None:
    store = opened(data_dir)
    assert store.leases.acquire("learner", "another", 60)
    report = run(data_dir)
    assert (report.state, report.round_id) == ("nothing", None)
    assert "Another learner is running" in report.sentence


def test_a_learner_that_waits_starts_when_the_other_is_done(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(data_dir)
    other = store.leases.acquire("learner", "another", 10_000)
    assert other
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 10.0
        if now[0] > 3600:
            store.leases.release(other)

    monkeypatch.setattr(learner.round.lease, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    assert "Another learner is running" in run(data_dir).sentence
    monkeypatch.setattr("learner.round.begin.blocked", lambda *_: "Its turn.")
    assert run_once(settings(data_dir), Stages(Console(quiet=True)), wait=True).sentence == "Its turn."
    assert now[0] > 3600


def test_a_learner_that_was_stopped_past_its_lease_publishes_nothing(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = alignment.judge_candidates

    def stopped_meanwhile(*arguments: Any) -> Verdict:
        verdict = judge(*arguments)
        store = opened(data_dir)
        store._db.execute("UPDATE leases SET expire_uptime = 0")
        assert store.leases.acquire("learner", "another", 60)
        return Verdict(verdict.chosen, [])

    monkeypatch.setattr(alignment, "judge_candidates", stopped_meanwhile)
    with pytest.raises(ConflictError, match="went to another"):
        run(data_dir)
    store = opened(data_dir)
    assert [policy.version for policy in store.policies.page()] == ["v0000"]
    assert store.policies.active().version == "v0000"
    # The other learner resumes the round.
    (round_,) = store.rounds.page()
    assert (round_.state, round_.stage) == ("running", "gate")


def test_waiting_for_servers(data_dir: Path) -> None:
    store = opened(data_dir)
    store.replicas.report("r1", "v0001")
    assert wait_until_loaded(store, "v0001", 0) == "1 running server loaded it."
    store.replicas.report("r2", "v0000")
    assert wait_until_loaded(store, "v0001", 0) == "1 of 2 running servers had not loaded it after 0 s."
    store.replicas.report("r2", "v0000", "bad tensor")
    # Its error about another version is from before.
    assert wait_until_loaded(store, "v0001", 0) == "1 of 2 running servers had not loaded it after 0 s."
    store.replicas.report("r2", "v0000", "v0001: bad tensor")
    assert "could not load it and kept v0000: v0001: bad tensor" in wait_until_loaded(store, "v0001", 0)


def test_a_machine_judges_choices_train_a_round(data_dir: Path) -> None:
    judge = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    gate = settings(data_dir).gate.model_copy(update={"canary": "off"})
    name = settings(data_dir, judge=judge).judge.name
    store = Store.open(data_dir)
    said: Any = {vote.comparison_id: vote.choice for vote in store.snapshots.take().choices}
    for one in store.machine_choices.missing(name):
        # It agrees with people.
        store.machine_choices.add(one, name, said[one.comparison_id], said[one.comparison_id])
    store.close()
    report = run(data_dir, judge=judge, gate=gate)
    assert report.metrics.votes
    trains = report.metrics.votes.train - report.metrics.votes.machine
    # Eighty comparisons: what people chose of those that train, and the same comparisons once more.
    assert (report.metrics.votes.choices, report.metrics.votes.machine) == (80, trains)
    assert report.metrics.votes.corrections == 0
    assert report.round_id
    store = Store.open(data_dir)
    sides = store.lineage.round_votes(report.round_id)
    [round_] = store.rounds.page()
    assert {side for vote, side in sides.items() if vote.startswith("machine_")} == {"train"}
    assert (round_.judge, round_.machine_watermark) == (name, 80)
    # What it said is learned from once, and without a judge in the settings not at all.
    assert run(data_dir, judge=judge).state == "nothing"
    assert run(data_dir).state == "nothing"
    # Another judge is something new.
    other = {**judge, "model": "other"}
    name = settings(data_dir, judge=other).judge.name
    for one in store.machine_choices.missing(name):
        store.machine_choices.add(one, name, said[one.comparison_id], said[one.comparison_id])
    store.close()
    assert run(data_dir, judge=other, gate=gate).round_id not in (None, report.round_id)


def test_workers_are_told_no_secrets(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their job may go to other machines, unencrypted."""
    jobs: list[Any] = []

    def hear(job: Any, *_: Any) -> Any:
        jobs.append(job)
        raise RuntimeError("no workers here")

    monkeypatch.setattr("learner.round.alignment.improve_stage.train_by_workers", hear)
    with pytest.raises(RuntimeError, match="no workers here"):
        run(data_dir, workers={"count": 2}, judge={"api_key": "sk-secret"})
    [job] = jobs
    assert b"sk-secret" not in pickle.dumps(job)
    assert job.settings.store_url.get_secret_value() == ""
    assert (job.settings.learner_device, len(job.prompts) > 0, job.votes) == ("cpu", True, None)

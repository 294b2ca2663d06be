"""A round whose candidate waits as a canary: what people are offered, what a due round does meanwhile, and kills."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

import learner.round.alignment.stages as alignment
import learner.round.gate.gate_stage as judging
import learner.round.review.canary as canary_stage
import learner.round.workspace as workspace
from learner.ops.status import status
from learner.reward.dataset import is_judge
from learner.round.preconditions import end_expired
from learner.round.report import Report
from learner.round.review.canary import why_no_canary
from learner.round.review.pool import pool, shipped
from learner.round.review.prompts import review_prompts
from learner.settings import LearnerSettings
from server.store.learning.round_metrics import WinRate
from server.store.store import Store
from tests.learner.rounds import TinyEngine, passing, run, settings, waiting

pytestmark = pytest.mark.usefixtures("engine")
ONLY_CANARIES = {"pairs": 8, "active_pairs": 0}


@pytest.fixture(autouse=True)
def people_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", waiting)


def test_a_canary_waits_and_the_incumbent_is_served(data_dir: Path) -> None:
    report = run(data_dir)
    assert (report.state, report.policy_version) == ("canary", "v0001")
    assert report.sentence.startswith(
        "v0001 waits as a canary until people have chosen between its answers and those of"
    )
    store = Store.open(data_dir)
    canary = store.canaries.waiting()
    assert canary
    assert (canary.version, canary.opponent_version, canary.round_id) == ("v0001", "v0000", report.round_id)
    # The only voter can say no more than there are pairs.
    offered = len(store._db.rows("SELECT 1 FROM reviews WHERE purpose = 'canary'"))
    assert (canary.evidence, canary.max_votes, canary.unit, canary.user_votes) == (50.0, offered, 1, 200)
    # Together with the evidence, chance alone promotes at most once in 20 times.
    assert canary.last_level == pytest.approx(0.03)
    assert store.policies.active().version == "v0000"
    assert store.rounds.get(canary.round_id).state == "canary"
    assert (data_dir / "policies" / "v0001").exists()
    assert dict(status(data_dir, 10, 10)["lines"])["canary"].startswith(
        "v0001 waits against v0000: it won 0.50 of 0 choices, evidence that it is better 1, worse 1; 50 decides, at "
    )


def test_what_counts_of_each_depends_on_who_votes(data_dir: Path) -> None:
    store, told = Store.open(data_dir), settings(data_dir)
    assert limits(store, told, pairs=100) == (1, 200, 100)
    assert limits(store, told, pairs=300) == (1, 200, 200)
    for number in range(19):
        store.feedback.submit_demonstration(f"user{number}", [{"role": "assistant", "content": "hello"}])
        if number == 0:
            # Ann and one more, of whom ten choices each count, if there are as many pairs.
            assert limits(store, told, pairs=100) == (1, 10, 20)
            assert limits(store, told, pairs=8) == (1, 10, 16)
    assert limits(store, told, pairs=100) == (3, 3, 200)


def limits(store: Store, told: LearnerSettings, pairs: int) -> tuple[int, int, int]:
    terms = canary_stage.canary_terms(store, told, time.time(), pairs)
    return terms.unit, terms.user_votes, terms.max_votes


def test_people_are_offered_the_pool_and_their_own_training_prompts(data_dir: Path) -> None:
    run(data_dir, review={"pairs": 8, "active_pairs": 0, "own_pairs": 2})
    store = Store.open(data_dir)
    # Ann asked all eighty questions; Bob asked nothing.
    assert store.reviews.waiting("bob") <= 8
    assert store.reviews.waiting("ann") == store.reviews.waiting("bob") + 2
    review = store.reviews.next("ann")
    assert review
    answers = {review.comparison.a.policy_version, review.comparison.b.policy_version}
    assert answers == {"v0000", "v0001"}
    [source] = store._db.rows("SELECT DISTINCT user FROM reviews WHERE user != ''")
    assert source["user"] == "ann"
    for row in store._db.rows("SELECT conversation_id FROM reviews WHERE conversation_id IS NOT NULL"):
        assert not is_judge(row["conversation_id"], 0.4)
    theirs = store.reviews.next("bob")
    assert theirs
    assert theirs.messages[0]["content"] in shipped()


def test_prompts_are_shared_only_where_the_operator_says_so(data_dir: Path) -> None:
    run(data_dir, review={"pairs": 8, "active_pairs": 0, "own_pairs": 2, "share_prompts": True})
    store = Store.open(data_dir)
    assert store.reviews.waiting("ann") == store.reviews.waiting("bob")
    assert len(store._db.rows("SELECT 1 FROM reviews WHERE conversation_id IS NOT NULL")) == 2


def test_the_operators_prompts_come_first(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Reset my router!\n\n  What is a VPN?  \nWhat is a VPN?\n", encoding="utf-8")
    assert pool((file,))[:3] == ["Reset my router!", "What is a VPN?", shipped()[0]]
    asked: list[str] = []

    def noted(work: Any) -> Any:
        found = review_prompts(work)
        asked.extend(prompt.messages[0]["content"] for prompt in found)
        return found

    monkeypatch.setattr(canary_stage, "review_prompts", noted)
    run(data_dir, review={"pairs": 8, "active_pairs": 0, "own_pairs": 0, "prompt_files": [str(file)]})
    assert set(asked[:2]) == {"Reset my router!", "What is a VPN?"}
    assert set(asked[2:]) <= set(shipped())
    assert len(asked) == 8


def test_a_file_that_cannot_be_read_stops_the_round_before_it_begins(data_dir: Path, tmp_path: Path) -> None:
    report = run(data_dir, review={"active_pairs": 0, "prompt_files": [str(tmp_path / "typo.txt")]})
    assert report.state == "nothing"
    assert report.sentence.startswith("A file of review.prompt_files cannot be read: [Errno 2]")


def test_the_shipped_prompts() -> None:
    assert len(set(shipped())) == 500
    assert all(line == line.strip() and len(line.split()) >= 2 for line in shipped())


def test_a_due_round_waits_for_the_canary(data_dir: Path) -> None:
    run(data_dir)
    report = run(data_dir)
    assert report.state == "nothing"
    assert report.sentence.startswith("v0001 waits as a canary")
    assert report.sentence.endswith("Nothing was changed.")


def test_a_promoted_canarys_round_is_promoted_and_the_next_one_starts_from_it(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(data_dir)
    store = Store.open(data_dir)
    store.policies.activate("v0001", actor="server", reason="People prefer it to v0000.")
    assert store.rounds.get(str(first.round_id)).state == "promoted"
    cast_one_more(store)
    store._db.execute("UPDATE policies SET metrics = json_set(metrics, '$.kl', 2.5) WHERE version = 'v0001'")
    monkeypatch.setattr(judging, "decide", passing)
    second = run(data_dir)
    assert (second.state, second.incumbent_version, second.policy_version) == ("promoted", "v0001", "v0002")
    # It may go as much further from the reference as the version that serves is from there.
    assert second.metrics.improvement
    assert (second.metrics.improvement.kl_budget, second.metrics.improvement.kl_target) == (8.5, 6.0)


def cast_one_more(store: Store) -> None:
    [turn] = store.conversations.turns("ann", store.conversations.page("ann")[0].id)
    assert turn.comparison
    store.feedback.submit_thumb("ann", turn.comparison.a.id, up=True)


def test_a_canary_that_expired_without_a_server_gives_way(data_dir: Path) -> None:
    first = run(data_dir)
    store = Store.open(data_dir)
    store._db.execute("UPDATE canaries SET expire_time = create_time")
    cast_one_more(store)
    second = run(data_dir)
    assert (second.state, second.policy_version) == ("canary", "v0002")
    round_ = store.rounds.get(str(first.round_id))
    assert round_.state == "rejected"
    assert round_.reason.startswith(
        "People have not decided between it and v0000, which stays: it won 0.50 of 0 choices"
    )


def test_all_choices_decide_on_a_canary_that_expired_without_a_server(data_dir: Path) -> None:
    run(data_dir)
    store = Store.open(data_dir)
    for _ in range(6):
        review = store.reviews.next("ann")
        assert review
        new = "A" if review.comparison.a.policy_version == "v0001" else "B"
        store.feedback.submit_choice("ann", review.comparison.id, new)
    canary = store.canaries.waiting()
    assert canary
    # Six of six are not enough before the end.
    assert (store.canaries.result(canary).better < canary.evidence, store.policies.active().version) == (True, "v0000")
    store._db.execute("UPDATE canaries SET expire_time = create_time")
    end_expired(store, canary)
    assert (store.canaries.waiting(), store.policies.active().version) == (None, "v0001")
    moved = store.lineage.moves(1)[0]
    assert moved.reason.endswith("chance alone says as much for it once in 64 times.")


@pytest.mark.parametrize("promoted", [False, True])
def test_a_round_killed_as_its_canary_began_ends_as_the_canary_did(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, promoted: bool
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any) -> Report:
        raise Killed

    monkeypatch.setattr(alignment, "finish", die)
    with pytest.raises(Killed):
        run(data_dir, review=ONLY_CANARIES)
    monkeypatch.undo()
    monkeypatch.setattr(workspace, "RolloutEngine", TinyEngine)
    store = Store.open(data_dir)
    before = store.reviews.waiting("bob")
    if promoted:
        store.policies.activate("v0001", actor="server", reason="People prefer it to v0000.")
    # A round that people have decided about has ended.
    assert run(data_dir, review=ONLY_CANARIES).state == ("nothing" if promoted else "canary")
    [round_] = store.rounds.page()
    assert round_.state == ("promoted" if promoted else "canary")
    assert store.reviews.waiting("bob") == (0 if promoted else before)
    assert before > 0


def test_an_operators_move_while_pairs_are_sampled_leaves_no_canary(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(data_dir)
    sample = canary_stage.sample_pairs

    def moved(work: Any, version: str) -> Any:
        store.policies.activate(version, actor="operator", action="promote")
        return sample(work, version)

    monkeypatch.setattr(canary_stage, "sample_pairs", moved)
    report = run(data_dir, review=ONLY_CANARIES)
    assert report.sentence == "v0001 does not wait as a canary: v0001 is active instead of v0000."
    assert (store.canaries.waiting(), store.reviews.waiting("bob")) == (None, 0)


def test_an_operators_move_in_the_meantime_is_not_put_to_the_vote(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data_dir)
    store = Store.open(data_dir)
    store.policies.activate("v0001", actor="operator", action="promote")
    cast_one_more(store)

    def moved(candidates: Any, *_: Any, **__: Any) -> Any:
        store.policies.activate("v0000", actor="operator", action="rollback")
        return waiting(candidates)

    monkeypatch.setattr(judging, "decide", moved)
    report = run(data_dir)
    assert report.state == "rejected"
    assert report.sentence == "v0002 does not wait as a canary: v0000 is active instead of v0001."
    assert store.canaries.waiting() is None


def test_small_services_skip_canaries_and_are_told(data_dir: Path) -> None:
    store = Store.open(data_dir)
    told = settings(data_dir)
    # Eighty votes in this minute.
    assert why_no_canary(store, told) == ""
    rare = told.model_copy(update={"gate": told.gate.model_copy(update={"canary_recent_votes": 81})})
    assert why_no_canary(store, rare) == (
        "There were 80 votes in the last 7 days, fewer than the 81 that people need to decide on a canary "
        "(gate.canary)."
    )
    always = rare.model_copy(update={"gate": rare.gate.model_copy(update={"canary": "on"})})
    assert why_no_canary(store, always) == ""
    never = told.model_copy(update={"gate": told.gate.model_copy(update={"canary": "off"})})
    assert why_no_canary(store, never) == "Canaries are off (gate.canary)."


def test_a_gate_that_cannot_ask_people_says_why(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def noted(candidates: Any, *_: Any, canary: bool) -> Any:
        seen.append(canary)
        return dataclasses.replace(passing(candidates), reasons=["The win rate against the incumbent may be chance."])

    # Not surely worse, and only more votes could decide it.
    monkeypatch.setattr(judging, "win_rate", lambda won, *_: WinRate(0.5, 0.4, 0.6, len(won.point)))
    monkeypatch.setattr(judging, "more_prompts_help", lambda *_: False)
    monkeypatch.setattr(judging, "decide", noted)
    report = run(data_dir, gate=settings(data_dir).gate.model_copy(update={"canary": "off"}))
    # It chooses, then it confirms.
    assert seen == [False, False]
    assert report.metrics.gate
    assert report.metrics.gate.no_canary == "Canaries are off (gate.canary)."

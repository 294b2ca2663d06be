"""How each user votes, and which users are suspicious."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from learner.cli import app
from learner.ops.users import UserFigures, fastest_minute, figures
from learner.ops.users_table import ROWS, print_users
from learner.reward.dataset import to_dataset
from learner.reward.voter_reliability import Verdicts
from learner.settings import RewardSettings
from server.store.chats.records import ChoiceVote, Correction, Demonstration, Snapshot, ThumbVote
from server.store.learning.records import QuarantineEvent
from server.store.store import Store
from tests.learner.reward.test_dataset import NOW, choice, response

runner = CliRunner()


def test_the_fastest_minute() -> None:
    # From 10 on: 10, 59.9, 60 and 69.9, and no more at 70.
    assert fastest_minute([60, 0, 10, 59.9, 69.9, 70]) == 4
    assert fastest_minute([0, 60, 120]) == 1
    assert fastest_minute([]) == 0


def crowd() -> Snapshot:
    """Ten users with ten choices each, one per minute; user0 makes them within ten seconds, eve has a vote of each
    kind."""
    choices: list[ChoiceVote] = []
    for number in range(10):
        for vote in range(10):
            time = NOW - 1000 + (vote if number == 0 else 60 * vote)
            said = "A" if number == 1 or vote % 2 else "B"
            choices.append(replace(choice(f"{number}-{vote}", said, user=f"user{number}"), create_time=time))
    shown = response("shown", "c-eve", [3])
    thumb, correction = ThumbVote("t", "eve", 1, shown, NOW - 500), Correction("c", "eve", "mine", shown, NOW - 400)
    return Snapshot(1, choices, [thumb], [correction], [Demonstration("d", "mallory", [], NOW)])


def read(snapshot: Snapshot, right: list[int]) -> list[UserFigures]:
    dataset = to_dataset(snapshot, NOW, 0.4, RewardSettings(), lambda text, ended: [7])
    heard = torch.tensor([10] * 10 + [0])
    found = Verdicts(heard, torch.tensor([*right, 0]), heard, torch.tensor([5, 10] + [5] * 8 + [0]))
    word = QuarantineEvent(1, "user3", "set", "operator", "a script", 1_000.0)
    return figures(snapshot, dataset, found, {"user2": 0.25}, {"user3": word})


def test_suspicious_users_come_first_with_the_reason() -> None:
    rows = read(crowd(), [8, 8, 0] + [8] * 7)
    assert [row.user for row in rows[:3]] == ["user2", "user1", "user0"]
    # Ten users with verdicts; 2^10 ways to be wrong or on one side.
    assert rows[0].suspicions == ["against the others: they predict 0 of 10 (p = 0.01)"]
    assert rows[0].p_value == pytest.approx(10 / 1024)
    assert rows[1].suspicions == ["one slot: A in 10 of 10 choices (p = 0.02)"]
    assert rows[1].p_value == pytest.approx(20 / 1024)
    assert rows[2].suspicions == []
    assert (rows[0].agreement, rows[0].verdicts, rows[0].weight_share) == (0.0, 10, 0.25)
    assert (rows[1].share_of_a, rows[1].agreement) == (1.0, 0.8)
    assert next(row.quarantined.reason for row in rows if row.quarantined) == "a script"


def test_too_fast_is_faster_than_the_others_and_than_reading() -> None:
    by_user = {row.user: row for row in read(crowd(), [8] * 10)}
    assert (by_user["user0"].fastest_minute, by_user["user4"].fastest_minute) == (10, 1)
    # P(X >= 10) of a mean of four is 0.0081, times twelve users.
    assert by_user["user0"].suspicions == []
    assert by_user["user0"].p_value == pytest.approx(12 * 0.008132, rel=1e-3)
    snapshot = crowd()
    more = [replace(vote, feedback_id=f"more{vote.feedback_id}") for vote in snapshot.choices[:2]]
    rows = read(replace(snapshot, choices=[*snapshot.choices, *more]), [8] * 10)
    assert [row.suspicions for row in rows if row.user == "user0"] == [["too fast: 12 votes in a minute (p = 0.01)"]]


def test_every_kind_of_vote_counts_and_shares_without_votes_are_none() -> None:
    by_user = {row.user: row for row in read(crowd(), [8] * 10)}
    assert by_user["eve"].votes == {"choices": 0, "thumbs": 1, "corrections": 1, "demonstrations": 0}
    assert by_user["mallory"].votes["demonstrations"] == 1
    for user in ("eve", "mallory"):
        assert (by_user[user].share_of_a, by_user[user].agreement, by_user[user].weight_share) == (None, None, 0.0)


def test_the_table_names_ids_and_reasons_and_counts_the_rest() -> None:
    rows = read(crowd(), [8, 8, 0] + [8] * 7)
    others = [replace(rows[-1], user=f"other{number}", suspicions=[]) for number in range(ROWS)]
    text = io.StringIO()
    print_users([*rows, *others], Console(file=text, width=200))
    shown = text.getvalue()
    assert "52 users, 2 suspicious" in shown
    assert "10 choices " in shown
    assert "1 thumbs, 1 corrections" in shown
    assert "25.0%" in shown
    assert "in quarantine since" in shown
    assert "a script" in shown
    assert "12 more; use --json to list them." in shown
    print_users([], Console(file=text))
    assert "Nobody has voted yet." in text.getvalue()


def test_the_command_reads_answers_that_no_round_has_read(data_dir: Path) -> None:
    store = Store.open(data_dir)
    store.quarantine.set("ann", actor="operator", reason="a test")
    store.close()
    result = runner.invoke(app, ["users", "--data-dir", str(data_dir), "--json"])
    assert result.exit_code == 0, result.output
    [ann] = json.loads(result.stdout)
    assert (ann["user"], ann["votes"]["choices"], ann["quarantined"]["reason"]) == ("ann", 80, "a test")
    # Nobody else voted, so nothing predicts her votes, and the next round has none of them.
    assert (ann["agreement"], ann["verdicts"], ann["weight_share"]) == (None, 0, 0.0)
    assert "ann" in runner.invoke(app, ["users", "--data-dir", str(data_dir)]).stdout
    # Features are cached where deletions find them.
    assert [path.name for path in (data_dir / "cache").iterdir()] == ["1"]


def test_few_votes_are_shown_and_not_compared(data_dir: Path) -> None:
    store = Store.open(data_dir)
    for vote in store.feedback.page("ann", 100):
        store.feedback.retract("ann", vote.id)
    assert "Nobody has voted yet." in runner.invoke(app, ["users", "--data-dir", str(data_dir)]).stdout
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    store.feedback.submit_demonstration("bob", messages)
    result = runner.invoke(app, ["users", "--data-dir", str(data_dir), "--json"])
    assert [(row["user"], row["verdicts"], row["weight_share"]) for row in json.loads(result.stdout)] == [("bob", 0, 0)]
    store.feedback.submit_thumb("ann", store.responses.comparison("ann", first_comparison(store)).a.id, up=True)
    store.close()
    result = runner.invoke(app, ["users", "--data-dir", str(data_dir), "--json"])
    rows = {row["user"]: row for row in json.loads(result.stdout)}
    assert (rows["ann"]["verdicts"], rows["ann"]["weight_share"], rows["bob"]["weight_share"]) == (0, 1.0, 0.0)


def first_comparison(store: Store) -> str:
    return str(store._db.rows("SELECT id FROM comparisons ORDER BY rowid")[0]["id"])


def test_the_command_without_votes_or_a_reference_is_a_sentence(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    result = runner.invoke(app, ["users", "--data-dir", str(tmp_path)])
    assert (result.exit_code, "There is no policy 'v0000'." in result.output) == (1, True)

"""The demo from end to end, killed at various points and run again."""

import ast
import shutil
import signal

import pytest

from clients.demo.questions import questions
from tests.clients.demo.conftest import HELD_OUT, VOTES, Demo

SIGKILL, SIGINT = signal.SIGKILL, signal.SIGINT
ASKED = questions(0)[:HELD_OUT]
VOTED_ON = questions(0)[HELD_OUT : HELD_OUT + VOTES]


def keep(run: Demo) -> tuple[str, str]:
    """The flags that keep the default directory after success."""
    return "--data-dir", str(run.directory)


def practised_on(run: Demo) -> list[list[str]]:
    lines = [line.removeprefix("practised on ") for line in run.world.learner.read() if "practised" in line]
    return [ast.literal_eval(line) for line in lines]


def test_the_whole_loop(run: Demo) -> None:
    ended = run.run(*keep(run))
    assert (ended.code, ended.complained) == (0, "")
    # The doctor's findings come first, without those about ports.
    lines = ended.said.splitlines()
    assert "This machine has one core: everything takes longer." in lines
    assert "A round needs 6 GiB." in lines
    assert "Choose another port." not in ended.said
    assert "The disk is slow." not in ended.said
    # 64 tokens per answer at 100 tokens/s; 24 + 40 + 24 answers, 1,300 for the round, 20 for the swap, and 80 s.
    assert "16 answers at once take 10.2 s here: about 16 minutes in total." in lines
    assert [line for line in lines if line.startswith("[")] == [
        f"[1/5] a server on {run.directory}",
        "[2/5] the taste: short whole answers: one that ends by itself, then the one with fewer words; 10% of the "
        "votes are flipped",
        "[3/5] one round of the learner; the server keeps serving",
        "[4/5] the swap",
        "[5/5] the same questions again",
    ]
    assert "judging candidates: 61.0 s" in lines
    assert "1.00, 95 % interval [0.86, 1.00]: 24 won, 0 tied, 0 lost" in ended.said
    assert "5.5 nats per answer" in ended.said
    assert practised_on(run) == [sorted(VOTED_ON)]
    [calls] = run.world.calls.read()
    assert (calls["Chat"], calls["Compare"], calls["SubmitChoice"]) == (48, 20, 20)
    # Nothing is left to do, and nothing is done.
    again = run.run(*keep(run))
    assert (again.code, len(run.world.calls.read())) == (0, 1)
    assert "24 won, 0 tied, 0 lost" in again.said


def test_the_default_directory_is_gone_after_a_good_end(run: Demo) -> None:
    assert run.run(FAKE_NO_DOCTOR="yes").code == 0
    assert not run.directory.exists()


@pytest.mark.parametrize(
    ("where", "number", "found"),
    [
        ("start", SIGKILL, ""),
        ("Chat 5", SIGINT, ""),
        ("Chat 20", SIGKILL, "before"),
        ("DeleteConversation 3", SIGINT, "24 answers of 24 before."),
        ("Compare 7", SIGKILL, "24 answers of 24 before"),
        ("SubmitChoice 7", SIGINT, "24 answers of 24 before, "),
        ("voted 7", SIGKILL, "24 answers of 24 before, "),
        ("learner", SIGINT, "24 answers of 24 before, 20 comparisons with their votes."),
        ("gate", SIGKILL, "24 answers of 24 before, 20 comparisons with their votes."),
        ("ended", SIGKILL, "24 answers of 24 before, 20 comparisons with their votes."),
        ("ended", SIGINT, "24 answers of 24 before, 20 comparisons with their votes."),
        ("GetActivePolicy", SIGKILL, "20 comparisons with their votes, 1 round of the learner."),
        ("Chat 30", SIGINT, "20 comparisons with their votes, 1 round of the learner"),
    ],
)
def test_a_demo_that_was_killed_goes_on(run: Demo, where: str, number: signal.Signals, found: str) -> None:
    killed = run.interrupt(where, number)
    if number == SIGINT:
        kept = f"demo: stopped. Progress is saved in {run.directory}; run the same command to resume.\n"
        assert (killed.code, killed.complained) == (1, kept)
    else:
        assert killed.code == -SIGKILL
    record = run.record
    cast = run.world.votes.read()
    ended = run.run(*keep(run))
    assert (ended.code, ended.complained) == (0, "")
    assert found in ended.said
    assert ("Resuming the demo in" in ended.said) == bool(found)
    assert "24 won, 0 tied, 0 lost" in ended.said
    # Questions that had their answer or vote are not asked or voted on again.
    calls = run.world.calls.read()[-1]
    measured = record["seconds_per_answer"] is not None
    before = len(record["before"]) if measured else 0
    assert calls["Chat"] == 48 - before - len(record["after"])
    assert calls.get("SubmitChoice", 0) == 20 - len(cast)
    questions_of = {key: message for key, (_, message) in run.world.conversations.read().items()}
    assert sorted(questions_of[vote.removeprefix("cmp ")] for vote in run.world.votes.read()) == sorted(VOTED_ON)
    # One round, begun once and ended once, on questions that are not asked afterwards.
    did = run.world.learner.read()
    assert [line for line in did if line.startswith(("began", "ended"))] == ["began round_1", "ended round_1"]
    assert ("resumed round_1" in did) == (where == "gate")
    assert did.count("started with 20 votes") == 1 + (where in ("learner", "gate"))
    assert len(practised_on(run)) == 1
    assert not set(practised_on(run)[0]) & set(ASKED)


def test_a_round_that_was_refused_is_followed_by_more_votes_and_another(run: Demo) -> None:
    rounds = {"FAKE_ROUNDS": "rejected promoted"}
    run.interrupt("Compare 40", SIGKILL, **rounds)
    assert [report["state"] for report in run.record["reports"]] == ["rejected"]
    ended = run.run(*keep(run), **rounds)
    assert ended.code == 0
    assert "Rejected: It was rejected." in ended.said
    assert "24 answers of 24 before, " in ended.said
    assert len(set(run.world.votes.read())) == len(run.world.votes.read()) == 120
    assert [line for line in run.world.learner.read() if line.startswith("ended")] == ["ended round_1", "ended round_2"]


def test_the_demos_voter_decides_about_a_canary_also_after_a_kill(run: Demo) -> None:
    canary = {"FAKE_ROUNDS": "canary"}
    run.interrupt("GetReview 2", SIGKILL, **canary)
    assert run.record["reports"] == []
    ended = run.run(*keep(run), **canary)
    assert (ended.code, ended.complained) == (0, "")
    # The learner is not run again; one choice came before the kill.
    assert [line for line in run.world.learner.read() if "ended" in line] == ["ended round_1"]
    assert run.world.votes.read().count("cmp") == 3
    assert [(report["state"], report["sentence"]) for report in run.record["reports"]] == [
        ("promoted", "It was preferred.")
    ]


def test_two_refusals_are_the_end(run: Demo) -> None:
    rounds = {"FAKE_ROUNDS": "rejected rejected"}
    sentence = (
        "demo: The learner rejected both rounds, the last one with: It was rejected. "
        f"Remove {run.directory} to start over.\n"
    )
    for _ in range(2):
        ended = run.run(**rounds)
        assert (ended.code, ended.complained) == (1, sentence)
    # The second time it does so without starting a server.
    assert len(run.world.calls.read()) == 1


def test_a_learner_that_fails_is_told_in_its_words_and_run_again(run: Demo) -> None:
    failed = run.run(FAKE_ROUNDS="failed")
    assert failed.code == 1
    assert failed.complained == (
        f"demo: The learner failed: The disk is full. Progress is saved in {run.directory}; "
        "run the same command to resume.\n"
    )
    assert run.run(FAKE_ROUNDS="failed promoted").code == 0


def test_a_server_that_ends_badly_is_told(run: Demo) -> None:
    ended = run.run(FAKE_END="3")
    assert ended.code == 1
    assert ended.complained.startswith("demo: The server exited with code 3: ")


def test_another_plan_is_one_sentence(run: Demo) -> None:
    run.interrupt("Compare 7", SIGKILL)
    ended = run.run("--votes", "21", "--taste", "crisp")
    assert (ended.code, ended.said) == (1, "")
    assert ended.complained == (
        f"demo: {run.directory} has a demo with taste short (not crisp), votes 20 (not 21): use its flags, remove "
        "the directory, or pass another --data-dir.\n"
    )


def test_a_directory_with_other_things_is_left_alone(run: Demo) -> None:
    run.directory.mkdir()
    (run.directory / "prefloop.db").write_text("mine")
    ended = run.run()
    assert ended.complained == (
        f"demo: {run.directory} is not a demo directory: remove it, or pass another --data-dir.\n"
    )
    assert (run.directory / "prefloop.db").read_text() == "mine"


def test_a_record_that_cannot_be_read_is_one_sentence(run: Demo) -> None:
    run.directory.mkdir()
    (run.directory / "demo.json").write_text("{")
    ended = run.run()
    assert ended.code == 1
    assert ended.complained.startswith(f"demo: {run.directory / 'demo.json'} cannot be read (")
    assert ended.complained.endswith(f"); remove {run.directory} to start over.\n")
    shutil.rmtree(run.directory)

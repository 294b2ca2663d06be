import io

import pytest
from rich.console import Console

from learner import progress
from learner.progress import Stages, so_far
from tests.ticks import Ticks


@pytest.mark.parametrize(
    ("done", "total", "seconds", "line"),
    [
        (0, None, 24.4, "gate, 24 s so far"),
        (0, 5, 60.0, "gate: 0 of 5, 60 s so far"),
        (2, 5, 160.0, "gate: 2 of 5, 160 s so far, about 240 s left"),
        (5, 5, 400.0, "gate: 5 of 5, 400 s so far, about 0 s left"),
    ],
)
def test_a_line_has_progress_before_its_first_comma_and_time_after_it(
    done: int, total: int | None, seconds: float, line: str
) -> None:
    assert so_far("gate", done, total, seconds) == line


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks, screen = Ticks.of(progress, monkeypatch), io.StringIO()
    stages = Stages(Console(file=screen, force_terminal=False, width=30))
    with stages.stage("improve", "improving the policy (PPO)", 9) as advance:
        ticks.pass_(10.0)
        advance(1)
        ticks.pass_(10.0)
        advance(2)
    with stages.stage("improve", "starting the engine"):
        ticks.pass_(10.0)
    # Not wrapped, although the console is narrow: a program that waits for the round reads them.
    assert screen.getvalue().splitlines() == [
        "improving the policy (PPO): 0 of 9, 10 s so far",
        "improving the policy (PPO): 1 of 9, 20 s so far, about 160 s left",
        "improving the policy (PPO): 20.0 s",
        "starting the engine, 10 s so far",
        "starting the engine: 10.0 s",
    ]
    assert stages.seconds == {"improve": 30.0}


def test_a_stage_that_fails_ends_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    Ticks.of(progress, monkeypatch)
    screen = io.StringIO()
    stages = Stages(Console(file=screen, force_terminal=False))
    with pytest.raises(RuntimeError), stages.stage("gate", "judging candidates", 5):
        raise RuntimeError
    assert (screen.getvalue(), stages.seconds) == ("", {})


def test_a_terminal_has_a_bar_and_no_lines() -> None:
    screen = io.StringIO()
    stages = Stages(Console(file=screen, force_terminal=True, width=100))
    with stages.stage("gate", "judging candidates", 2) as advance:
        advance(2)
    assert "2/2" in screen.getvalue()
    assert "so far" not in screen.getvalue()

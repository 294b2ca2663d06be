import io

import pytest
from rich.console import Console

from clients.demo import progress as module
from clients.demo.progress import Task, progress
from tests.ticks import Ticks


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def file(screen: io.StringIO) -> Console:
    return Console(file=screen, force_terminal=False, width=40)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    return Ticks.of(module, monkeypatch)


def advanced(task: Task, times: int) -> Task:
    for _ in range(times):
        task.advance()
    return task


def test_a_line_says_how_far_it_is_and_how_long_it_will_take() -> None:
    voting = Task("voting", 150)
    assert voting.so_far(10.0) == "voting: 0 of 150, 10 s so far"
    assert advanced(voting, 40).so_far(31.0) == "voting: 40 of 150, 31 s so far, about 85 s left"
    assert advanced(voting, 110).so_far(120.4) == "voting: 150 of 150, 120 s so far, about 0 s left"


def test_what_was_done_earlier_took_no_time_now() -> None:
    # 10 in 5 s, and 40 are left.
    assert (
        advanced(Task("voting", 150, before=100), 10).so_far(5.0) == "voting: 110 of 150, 5 s so far, about 20 s left"
    )


def test_a_line_on_what_has_no_parts_says_what_happens() -> None:
    task = Task("starting the server")
    assert task.so_far(10.0) == "starting the server, 10 s so far"
    task.say("starting the engine")
    assert task.so_far(20.0) == "starting the server: starting the engine, 20 s so far"


def test_without_a_terminal_there_is_a_line_every_ten_seconds(file: Console, screen: io.StringIO, ticks: Ticks) -> None:
    with progress(file, "asking, before", 64) as task:
        ticks.pass_(10.0)
        advanced(task, 16)
        ticks.pass_(10.0)
        assert screen.getvalue().splitlines() == [
            "asking, before: 0 of 64, 10 s so far",
            "asking, before: 16 of 64, 20 s so far, about 60 s left",
        ]
        advanced(task, 48)
    assert screen.getvalue().splitlines()[2:] == ["asking, before: 64 of 64, 20 s"]


def test_what_failed_says_nothing_more(file: Console, screen: io.StringIO, ticks: Ticks) -> None:
    with pytest.raises(RuntimeError), progress(file, "the swap"):
        raise RuntimeError
    assert screen.getvalue() == ""


def test_a_terminal_has_a_bar_and_no_lines(screen: io.StringIO) -> None:
    terminal = Console(file=screen, force_terminal=True, width=80)
    with progress(terminal, "voting", 2) as task:
        advanced(task, 2)
    assert "2/2" in screen.getvalue()
    assert "so far" not in screen.getvalue()


def test_a_terminal_shows_what_happens_as_it_is(screen: io.StringIO) -> None:
    terminal = Console(file=screen, force_terminal=True, width=80)
    with progress(terminal, "starting the server") as task:
        task.say("loading [bold]weights[/bold]")
    assert "[bold]weights[/bold]" in screen.getvalue()

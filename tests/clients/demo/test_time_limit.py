import pytest

from clients.demo.time_limit import Limit, OverdueError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_wait_ends_after_its_seconds_and_says_for_what_it_was(clock: Clock) -> None:
    limit = Limit("The voting", 90.0, now=clock)
    clock.now += 90.0
    limit.check()
    clock.now += 0.1
    with pytest.raises(OverdueError, match=r"^The voting took longer than 90 s\.$"):
        limit.check()


def test_progress_puts_the_end_off_and_the_whole_has_one_all_the_same(clock: Clock) -> None:
    limit = Limit("The round", 1000.0, silent=300.0, now=clock)
    for _ in range(3):
        clock.now += 300.0
        limit.check()
        limit.progress()
    clock.now += 100.0
    limit.check()
    clock.now += 1.0
    with pytest.raises(OverdueError, match=r"^The round took longer than 1000 s\.$"):
        limit.check()


def test_a_wait_without_progress_ends_early(clock: Clock) -> None:
    limit = Limit("The round", 1000.0, silent=300.0, now=clock)
    clock.now += 200.0
    limit.progress()
    clock.now += 301.0
    with pytest.raises(OverdueError, match=r"^The round made no progress for 300 s\.$"):
        limit.check()

"""Debian cron's rules: what a line means, and the nights when clocks change."""

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from learner.ops.cron import Cron

BERLIN = ZoneInfo("Europe/Berlin")


def times(line: str, after: datetime, count: int) -> list[str]:
    trigger, found = Cron(line, after.tzinfo or UTC), []
    when: datetime | None = after
    for _ in range(count):
        when = trigger.get_next_fire_time(when, after)
        assert when is not None
        found.append(f"{when:%a %Y-%m-%d %H:%M%z}")
    return found


@pytest.mark.parametrize(
    ("line", "first", "second"),
    [
        ("0 3 * * 0", "Sun 2026-11-29 03:00", "Sun 2026-12-06 03:00"),
        ("0 3 * * 7", "Sun 2026-11-29 03:00", "Sun 2026-12-06 03:00"),
        ("0 3 * * sun", "Sun 2026-11-29 03:00", "Sun 2026-12-06 03:00"),
        ("0 3 * * 1", "Mon 2026-11-30 03:00", "Mon 2026-12-07 03:00"),
        ("0 3 * * 1-5", "Fri 2026-11-27 03:00", "Mon 2026-11-30 03:00"),
        # Both days are restricted: either matches.
        ("0 3 1 * 1", "Mon 2026-11-30 03:00", "Tue 2026-12-01 03:00"),
        # One is a star with a step: both must hold.
        ("0 3 */2 * 1", "Mon 2026-12-07 03:00", "Mon 2026-12-21 03:00"),
        ("*/20 3 * * *", "Fri 2026-11-27 03:00", "Fri 2026-11-27 03:20"),
        ("0 3 29 2 *", "Tue 2028-02-29 03:00", "Sun 2032-02-29 03:00"),
        ("@daily", "Fri 2026-11-27 00:00", "Sat 2026-11-28 00:00"),
        ("@weekly", "Sun 2026-11-29 00:00", "Sun 2026-12-06 00:00"),
        ("@hourly", "Thu 2026-11-26 13:00", "Thu 2026-11-26 14:00"),
        ("@monthly", "Tue 2026-12-01 00:00", "Fri 2027-01-01 00:00"),
        ("@yearly", "Fri 2027-01-01 00:00", "Sat 2028-01-01 00:00"),
    ],
)
def test_a_line_means_what_it_means_to_cron(line: str, first: str, second: str) -> None:
    thursday = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
    assert times(line, thursday, 2) == [f"{first}+0000", f"{second}+0000"]


def test_the_night_without_two_o_clock_has_its_round_when_that_hour_is_over() -> None:
    saturday = datetime(2027, 3, 27, 12, 0, tzinfo=BERLIN)
    assert times("30 2 * * *", saturday, 2) == ["Sun 2027-03-28 03:00+0200", "Mon 2027-03-29 02:30+0200"]


def test_the_night_with_two_o_clock_twice_has_one_round() -> None:
    saturday = datetime(2026, 10, 24, 12, 0, tzinfo=BERLIN)
    assert times("30 2 * * *", saturday, 2) == ["Sun 2026-10-25 02:30+0200", "Mon 2026-10-26 02:30+0100"]


def test_an_interval_of_hours_continues_through_both_nights() -> None:
    before = datetime(2026, 10, 25, 1, 30, tzinfo=BERLIN)
    found = times("0 * * * *", before, 3)
    assert found == ["Sun 2026-10-25 02:00+0200", "Sun 2026-10-25 02:00+0100", "Sun 2026-10-25 03:00+0100"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "is not a cron line: Wrong number of fields"),
        ("0 3 * *", "is not a cron line: Wrong number of fields"),
        ("60 3 * * *", "is not a cron line: Bad minute"),
        ("0 24 * * *", "is not a cron line: Bad hour"),
        ("0 3 * * 8", "is not a cron line: Bad day-of-week"),
        ("@reboot", "is not a cron line: Wrong number of fields"),
        ("0 3 30 2 *", "is not a cron line: Bad day-of-month"),
    ],
)
def test_an_invalid_line_is_refused(line: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(repr(line))} {why}$"):
        Cron(line, UTC)


def test_a_time_is_never_given_twice() -> None:
    trigger = Cron("0 3 * * *", UTC)
    fired = datetime(2026, 11, 26, 3, 0, tzinfo=UTC)
    # The clock was set back in the meantime.
    assert trigger.get_next_fire_time(fired, fired - timedelta(hours=1)) == fired + timedelta(days=1)

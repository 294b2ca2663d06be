"""Turns a cron line into an APScheduler trigger, by the rules of Debian's cron: Sunday is 0 or 7, and if both days are
restricted, either matches. cronsim parses the line and handles clock changes.
"""

import os
from datetime import datetime, tzinfo

from apscheduler.triggers.base import BaseTrigger
from cronsim import CronSim, CronSimError
from tzlocal import get_localzone

NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


def local_zone() -> tzinfo:
    """This machine's time zone. Raises ValueError if TZ is not the name of one."""
    try:
        return get_localzone()
    except (LookupError, ValueError) as error:
        name = os.environ.get("TZ", "")
        raise ValueError(f"TZ={name!r} is not a time zone; use one such as Europe/Berlin") from error


class Cron(BaseTrigger):  # type: ignore[misc]
    """The times of a cron line in a time zone. Raises ValueError if the line is invalid or has no times."""

    def __init__(self, line: str, timezone: tzinfo) -> None:
        self._line = NICKNAMES.get(line.strip(), line)
        self._timezone = timezone
        try:
            first = self.get_next_fire_time(None, datetime.now(timezone))
        except CronSimError as error:
            raise ValueError(f"{line!r} is not a cron line: {error}") from error
        if first is None:
            raise ValueError(f"{line!r} is a cron line that matches no date")

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """The first time after the previous one, or after `now`; None if there is none within fifty years."""
        after = previous_fire_time or now
        return next(CronSim(self._line, after.astimezone(self._timezone)), None)

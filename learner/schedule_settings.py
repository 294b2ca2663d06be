"""When rounds start by themselves."""

from datetime import time

from pydantic import BaseModel, ConfigDict, Field, field_validator

from learner.number_types import Positive
from server.store.chats.snapshots import MOST_COUNTED


class ScheduleSettings(BaseModel):
    """When `learner schedule` starts a round by itself. Times are local. Requested rounds are not affected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cron: str = Field("0 3 * * *", description="Five cron fields, as Debian's cron reads them, or @daily and the like.")
    interval_minutes: float | None = Field(None, gt=0, description="Minutes between rounds; if set, `cron` is ignored.")
    on_request: bool = Field(False, description="Start rounds only when RequestRound asks for one.")
    min_new_votes: int = Field(
        1, ge=0, le=MOST_COUNTED, description="Minimum votes since the last round for a new one to start."
    )
    quiet_hours: str = Field("", description="Hours without rounds, such as `07:00-23:00`; a round that is due waits.")
    retry_minutes: Positive = Field(
        5.0, description="Minutes before a failed round is retried; doubled with each further failure."
    )
    retries: int = Field(4, ge=0, description="How many times a failed round is retried before its next regular time.")

    @field_validator("quiet_hours")
    @classmethod
    def _hours(cls, hours: str) -> str:
        if hours:
            quiet_hours(hours)
        return hours


def quiet_hours(hours: str) -> tuple[time, time]:
    """Start and end of hours such as 22:00-07:00. Raises ValueError if they are invalid."""
    try:
        start, end = (time.fromisoformat(part.strip()) for part in hours.split("-"))
    except ValueError as error:
        raise ValueError(f"{hours!r} is not a range of hours such as 22:00-07:00") from error
    return start, end


def quiet(hours: str, now: time) -> bool:
    """Whether `now` is within the hours; False if there are none."""
    if not hours:
        return False
    start, end = quiet_hours(hours)
    return start <= now < end if start <= end else now >= start or now < end

"""A round's metrics as the learner reported them; metrics that a round never reached are None."""

from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from prefloop.v1.policy_pb2 import (
    ROUND_KIND_SFT,
    ROUND_STATE_CANARY,
    ROUND_STATE_FAILED,
    ROUND_STATE_PROMOTED,
    ROUND_STATE_REJECTED,
    ROUND_STATE_RUNNING,
    Round,
)

from clients.web.charts.chart import Chart, intervals
from clients.web.charts.curves import epoch_curves, step_curves

STATES = {
    ROUND_STATE_RUNNING: "running",
    ROUND_STATE_CANARY: "canary",
    ROUND_STATE_PROMOTED: "promoted",
    ROUND_STATE_REJECTED: "rejected",
    ROUND_STATE_FAILED: "failed",
}


@dataclass(frozen=True)
class Interval:
    """A share with its 95 % interval."""

    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.2f} [{self.low:.2f}, {self.high:.2f}]"


class RoundFigures:
    """The metrics of a round."""

    def __init__(self, round_: Round) -> None:
        self.id = round_.round_id
        self.state = STATES.get(round_.state, "")
        self.stage = round_.stage
        self.reason = round_.reason
        self.version = round_.policy_version
        self.create_time = round_.create_time
        self.metrics: dict[str, Any] = MessageToDict(round_.metrics)
        self.imitates = round_.kind == ROUND_KIND_SFT
        self.promoted = round_.state == ROUND_STATE_PROMOTED

    def figure(self, *path: str) -> Any:
        """A metric by its path; None if it is missing."""
        found: Any = self.metrics
        for name in path:
            if not isinstance(found, dict) or name not in found:
                return None
            found = found[name]
        return found

    @property
    def short_id(self) -> str:
        return self.id.removeprefix("round_")[:6]

    @property
    def votes(self) -> int | None:
        """How many votes it used, or demonstrations and corrections."""
        if shown := self.figure("sft"):
            return int(shown["demonstrations"] + shown["corrections"])
        votes = self.figure("votes")
        return votes and int(sum(votes.get(kind, 0) for kind in ("choices", "thumbs", "corrections")))

    @property
    def accuracy(self) -> float | None:
        accuracy: float | None = self.figure("reward_model", "accuracy")
        return accuracy

    @property
    def kl(self) -> float | None:
        kl: float | None = self.figure("gate", "chosen", "kl")
        return kl

    @property
    def win_rate(self) -> Interval | None:
        return interval(self.figure("gate", "chosen", "against_incumbent"))

    @property
    def checks(self) -> str:
        """How many of the operator's checks the candidate passed, with its score; empty if there were none."""
        if not (found := self.figure("gate", "checks")):
            return ""
        passed = int(found["checks"]) - len(found["failed"])
        score = "" if found["score"] is None else f", score {found['score']:g}"
        return f"{passed} of {int(found['checks'])}{score}"

    @property
    def minutes(self) -> float | None:
        seconds: dict[str, float] | None = self.figure("seconds")
        return None if seconds is None else sum(seconds.values()) / 60

    @property
    def seconds(self) -> list[tuple[str, float]]:
        """The seconds of each stage, longest first."""
        return sorted((self.figure("seconds") or {}).items(), key=lambda stage: -stage[1])

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """Each judged step: `step`, `kl`, `incumbent` and `reference` (win rates against them), `chosen`."""
        chosen = self.figure("gate", "chosen", "step")
        return [
            {
                "step": int(candidate["step"]),
                "kl": candidate["kl"],
                "incumbent": interval(candidate["against_incumbent"]),
                "reference": interval(candidate["against_reference"]),
                "chosen": candidate["step"] == chosen,
            }
            for candidate in self.figure("gate", "candidates") or []
        ]

    @property
    def curves(self) -> list[Chart]:
        """Training curves by step, with the chosen step marked."""
        if shown := self.figure("sft"):
            return epoch_curves(shown)
        return step_curves(self.figure("improvement") or {}, self.figure("gate", "chosen", "step"))


def interval(found: dict[str, float] | None) -> Interval | None:
    """An Interval from the learner's metrics; None if there was no judge."""
    return None if found is None or found["rate"] is None else Interval(found["rate"], found["low"], found["high"])


def win_rates(rounds: list[RoundFigures]) -> Chart:
    """A chart of every judged round's win rate against the version before it, oldest first."""
    judged = [(round_, rate) for round_ in reversed(rounds) if (rate := round_.win_rate)]
    return intervals(
        "Win rate against the version before",
        "share won",
        "round (filled: promoted)",
        [(round_.short_id, rate.rate, rate.low, rate.high, round_.promoted) for round_, rate in judged],
        level=(0.5, "even"),
    )

"""Choices of a machine judge between the two answers of a comparison. They are no feedback: nobody gave them."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

from server.store.chats.loading import load_comparisons
from server.store.chats.records import Choice, Comparison
from server.store.database import UNLIMITED, Database

# What a judge said of two answers in one order: the first or the second is better, neither, or nothing that could be
# read.
Verdict = Literal["A", "B", "TIE", "UNREADABLE"]


class Asked(NamedTuple):
    """A comparison that a user asked for."""

    comparison_id: str
    user: str
    conversation_id: str


@dataclass(frozen=True)
class MachineChoice:
    """What a judge said of a comparison: as its answers were `shown` to people, and with the answers `swapped`, both in
    terms of the comparison's own A and B."""

    seq: int
    comparison: Comparison
    shown: Verdict
    swapped: Verdict

    @property
    def feedback_id(self) -> str:
        """Its name among the votes of a round."""
        return f"machine_{self.seq}"

    @property
    def choice(self) -> Choice | None:
        """Its choice: the answer that won in both orders, or else neither; None if it could not be read."""
        if self.shown == "UNREADABLE" or self.swapped == "UNREADABLE":
            return None
        return self.shown if self.shown == self.swapped else "TIE"


@dataclass(frozen=True)
class SaidOfUser:
    """What a judge said of a user's comparison."""

    seq: int
    comparison_id: str
    judge: str
    shown: Verdict
    swapped: Verdict
    create_time: float


class MachineChoices:
    """Reads and writes of them. `judge` names a model with its rubric: another one begins from nothing."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def add(self, asked: Asked, judge: str, shown: Verdict, swapped: Verdict) -> None:
        """Store what the judge said, unless the comparison was deleted in the meantime or is judged already."""
        with self._db.write():
            known = self._db.row(
                "SELECT 1 FROM machine_choices WHERE comparison_id = ? AND judge = ?", [asked.comparison_id, judge]
            )
            if known or not self._db.row("SELECT 1 FROM comparisons WHERE id = ?", [asked.comparison_id]):
                return
            self._db.insert(
                "machine_choices",
                {
                    "comparison_id": asked.comparison_id,
                    "user": asked.user,
                    "judge": judge,
                    "shown": shown,
                    "swapped": swapped,
                    "create_time": self._db.now(),
                },
            )

    def missing(self, judge: str, without: Collection[str] = ()) -> list[Asked]:
        """The comparisons of two whole answers that the judge has not seen, newest first: those that people have chosen
        between before the others. Without those of some users."""
        rows = self._db.rows(
            "SELECT id, user, conversation_id FROM comparisons c WHERE 2 = (SELECT count(*) FROM responses "
            "WHERE id IN (c.response_a, c.response_b) AND finish_reason IN ('stop', 'stop_sequence', 'length')) "
            f"AND NOT {self._db.AMONG} "
            "AND NOT EXISTS (SELECT 1 FROM machine_choices WHERE comparison_id = c.id AND judge = ?) "
            "ORDER BY EXISTS (SELECT 1 FROM feedback WHERE comparison_id = c.id) DESC, c.rowid DESC",
            [json.dumps(list(without)), judge],
        )
        return [Asked(row["id"], row["user"], row["conversation_id"]) for row in rows]

    def page(self, user: str, limit: int, after: int = 0) -> list[SaidOfUser]:
        """What any judge said of the user's comparisons, oldest first; at most `limit` after the number `after`."""
        rows = self._db.rows(
            "SELECT seq, comparison_id, judge, shown, swapped, create_time FROM machine_choices "
            "WHERE user = ? AND seq > ? AND shown IS NOT NULL ORDER BY seq LIMIT ?",
            [user, after, limit],
        )
        return [SaidOfUser(**row) for row in rows]

    def watermark(self) -> int:
        """The number of the newest one; 0 before the first."""
        return int(self._db.rows("SELECT coalesce(max(seq), 0) AS seq FROM machine_choices")[0]["seq"])

    def all(self, judge: str, watermark: int = UNLIMITED, without: Collection[str] = ()) -> list[MachineChoice]:
        """What the judge said up to `watermark` of comparisons that were not deleted since, oldest first; without those
        of some users."""
        rows = self._db.rows(
            "SELECT * FROM machine_choices WHERE judge = ? AND seq <= ? AND shown IS NOT NULL "
            f"AND NOT {self._db.AMONG} ORDER BY seq",
            [judge, watermark, json.dumps(list(without))],
        )
        comparisons = load_comparisons(self._db, (row["comparison_id"] for row in rows))
        return [
            MachineChoice(row["seq"], comparisons[row["comparison_id"]], row["shown"], row["swapped"])
            for row in rows
            if row["comparison_id"] in comparisons
        ]

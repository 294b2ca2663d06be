"""Lineage: which votes each round learned from, which versions carry them, and every move of the pointer.

A round stores its votes by feedback id; a vote that is changed later keeps its id, and the round's watermark says which
of its events the round saw. Nothing here is deleted with a conversation, since it has no content.
"""

from collections.abc import Iterable
from typing import NamedTuple

from server.shared import stored_round
from server.store.chats.records import Choice, Feedback, FeedbackEvent
from server.store.database import UNLIMITED, Database, Row
from server.store.e_value import AbTestResult
from server.store.learning.leases import check_fence
from server.store.learning.records import Lease, PointerEvent, Side


class ChoiceBetween(NamedTuple):
    """A choice between answers of two versions, as it was first made."""

    user: str
    value: Choice
    # The version that answered as A.
    version_a: str


class Lineage:
    """Reads and writes of lineage."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def set_round_votes(self, round_id: str, votes: Iterable[tuple[str, Side]], *, fence: Lease) -> None:
        """Set the (feedback id, side) pairs that the round learns from, instead of earlier ones."""
        with self._db.write():
            check_fence(self._db, fence)
            self._db.execute("DELETE FROM round_votes WHERE round_id = ?", [round_id])
            for feedback_id, side in votes:
                self._db.insert("round_votes", {"round_id": round_id, "feedback_id": feedback_id, "side": side})

    def round_votes(self, round_id: str) -> dict[str, Side]:
        """The side of each vote that the round learned from, by feedback id."""
        rows = self._db.rows("SELECT feedback_id, side FROM round_votes WHERE round_id = ?", [round_id])
        return {row["feedback_id"]: row["side"] for row in rows}

    def rounds_of(self, feedback_id: str) -> dict[str, Side]:
        """The rounds that learned from a vote, oldest first, and the vote's side in each."""
        rows = self._db.rows(
            "SELECT v.round_id, v.side FROM round_votes v JOIN rounds r ON r.id = v.round_id "
            "WHERE v.feedback_id = ? ORDER BY r.create_time",
            [feedback_id],
        )
        return {row["round_id"]: row["side"] for row in rows}

    def rounds_trained_on(self, user: str) -> list[str]:
        """The rounds that trained on a user's votes, oldest first, even if the votes were changed or deleted since; not
        those that only judged by them."""
        rows = self._db.rows(
            "SELECT id FROM rounds WHERE id IN (SELECT v.round_id FROM feedback_events e JOIN round_votes v "
            "USING (feedback_id) WHERE e.user = ?1 AND v.side = 'train') "
            # What a machine said about the user's answers is about the user.
            "OR id IN (SELECT v.round_id FROM machine_choices m JOIN round_votes v "
            "ON v.feedback_id = 'machine_' || m.seq WHERE m.user = ?1) ORDER BY create_time",
            [user],
        )
        return [row["id"] for row in rows]

    def ancestors(self, version: str) -> list[str]:
        """The version and what its weights come from, back to the model: what its round started from, and so on."""
        rows = self._db.rows(
            "SELECT p.version, p.parent_version, p.reference_version, coalesce(r.settings, '{}') AS settings "
            "FROM policies p LEFT JOIN rounds r ON r.id = p.round_id"
        )
        starts = {row["version"]: _start(row) for row in rows}
        found = [version]
        while (before := starts.get(found[-1])) and before not in found:
            found.append(before)
        return found

    def imitated(self, version: str) -> set[str]:
        """The feedback ids of all that a version's weights, or what they come from, were trained on token by token:
        demonstrations and corrections by supervised fine-tuning, and votes by DPO."""
        marks = ", ".join("?" * len(versions := self.ancestors(version)))
        rounds = self._db.rows(
            "SELECT r.id, r.kind, r.settings FROM policies p JOIN rounds r ON r.id = p.round_id "
            f"WHERE p.version IN ({marks})",
            versions,
        )
        imitating = [row["id"] for row in rounds if row["kind"] == "sft" or _improver(row) == "dpo"]
        return {
            feedback_id
            for round_id in imitating
            for feedback_id, side in self.round_votes(round_id).items()
            if side == "train"
        }

    def carriers(self, round_ids: Iterable[str]) -> dict[str, str]:
        """The state of each version that carries these rounds' votes, oldest first: the rounds' own versions, and those
        whose rounds started from one, or whose reference is one."""
        rounds, found = set(round_ids), dict[str, str]()
        rows = self._db.rows(
            "SELECT p.version, p.state, p.round_id, p.parent_version, p.reference_version, "
            "coalesce(r.settings, '{}') AS settings FROM policies p LEFT JOIN rounds r ON r.id = p.round_id "
            "ORDER BY p.rowid"
        )
        for row in rows:  # A parent comes before its children.
            if row["round_id"] in rounds or _start(row) in found:
                found[row["version"]] = row["state"]
        return found

    def events(self, feedback_id: str) -> list[FeedbackEvent]:
        """All events of a vote, oldest first."""
        rows = self._db.rows("SELECT * FROM feedback_events WHERE feedback_id = ? ORDER BY seq", [feedback_id])
        return [FeedbackEvent(**row) for row in rows]

    def past_feedback(self, user: str, limit: int, after: int = 0) -> list[Feedback]:
        """The user's votes as they were before they were changed or retracted, oldest first; at most `limit` after the
        event with the number `after`."""
        rows = self._db.rows(
            "SELECT feedback_id AS id, seq AS event_seq, user, kind, response_id, comparison_id, value, comment, "
            "create_time FROM feedback_events e WHERE user = ? AND seq > ? AND action = 'submit' AND value IS NOT NULL "
            "AND NOT EXISTS (SELECT 1 FROM feedback WHERE id = e.feedback_id AND event_seq = e.seq) "
            "ORDER BY seq LIMIT ?",
            [user, after, limit],
        )
        return [Feedback(**row) for row in rows]

    def fate(self, round_id: str, watermark: int) -> dict[str, int]:
        """How many of the round's votes were changed, retracted and deleted since it took its snapshot."""
        rows = self._db.rows(
            "SELECT action, count(*) AS votes FROM feedback_events JOIN (SELECT max(e.seq) AS seq "
            "FROM feedback_events e JOIN round_votes v USING (feedback_id) WHERE v.round_id = ? AND e.seq > ? "
            "GROUP BY e.feedback_id) AS newest USING (seq) GROUP BY action",
            [round_id, watermark],
        )
        found = {row["action"]: int(row["votes"]) for row in rows}
        return {
            "changed": found.get("submit", 0),
            "retracted": found.get("retract", 0),
            "deleted": found.get("delete", 0),
        }

    def moves(self, limit: int = UNLIMITED) -> list[PointerEvent]:
        """Moves of the pointer, newest first."""
        rows = self._db.rows("SELECT * FROM pointer_events ORDER BY seq DESC LIMIT ?", [limit])
        return [PointerEvent(**row) for row in rows]

    def duel(self, voters: int, user_votes: int) -> AbTestResult | None:
        """Choices between answers of the active version and the previous one since the activation, without users in
        quarantine. None if it became active by a rollback, or the two have different references: no server has both.

        One choice of each user counts, the first, so that the result holds for people in general: choices of one
        person are alike. Where fewer than `voters` people vote at all, these are everybody there is, and the first
        `user_votes` of each count; of a single one all. What counts is what was first said of a comparison: after that
        its versions are shown."""
        last = next(iter(self.moves(1)), None)
        if last is None or last.previous_version is None or last.action not in ("activate", "promote"):
            return None
        pair = [last.version, last.previous_version]
        [row] = self._db.rows(
            "SELECT count(DISTINCT reference_version) AS lineages FROM policies WHERE version IN (?, ?)", pair
        )
        if row["lineages"] > 1:
            return None
        found = self.count_voters(voters)
        few = found if found < voters else 0
        counted = user_votes if few > 1 else UNLIMITED if few == 1 else 1
        votes = self.choices_between(last.version, last.previous_version, last.create_time, counted)
        winners = [
            None if vote.value not in ("A", "B") else (vote.value == "A") == (vote.version_a == last.version)
            for vote in votes
        ]
        return AbTestResult(
            last.version, last.previous_version, winners.count(True), winners.count(False), winners.count(None), few
        )

    def choices_between(self, version: str, opponent: str, since: float, user_votes: int) -> list[ChoiceBetween]:
        """The first `user_votes` choices of each user between answers of two versions, of blind comparisons made since
        a time, in the order in which they were first made; without users in quarantine. Choices that were retracted
        since count, too: a user who sees the versions could take back what does not suit them."""
        rows = self._db.rows(
            "SELECT user, value, version_a FROM (SELECT e.user, e.value, e.seq, a.policy_version AS version_a, "
            "row_number() OVER (PARTITION BY e.user ORDER BY e.seq) AS nth FROM comparisons c "
            "JOIN responses a ON a.id = c.response_a JOIN responses b ON b.id = c.response_b "
            "JOIN feedback_events e ON e.seq = (SELECT min(seq) FROM feedback_events "
            "WHERE comparison_id = c.id AND kind = 'choice' AND action = 'submit') "
            "WHERE c.create_time >= ?3 AND c.blind = 1 AND e.value IS NOT NULL "
            "AND e.user NOT IN (SELECT user FROM quarantined) "
            "AND ((a.policy_version = ?1 AND b.policy_version = ?2) "
            "OR (a.policy_version = ?2 AND b.policy_version = ?1))) AS placed WHERE nth <= ?4 ORDER BY seq",
            [version, opponent, since, user_votes],
        )
        return [ChoiceBetween(**row) for row in rows]

    def count_voters(self, limit: int, since: float = 0.0) -> int:
        """How many users have current feedback from after a time, at most `limit`; without users in quarantine."""
        [row] = self._db.rows(
            "SELECT count(*) AS voters FROM (SELECT DISTINCT user FROM feedback "
            "WHERE create_time >= ? AND user NOT IN (SELECT user FROM quarantined) LIMIT ?) AS voting",
            [since, limit],
        )
        return int(row["voters"])

    def thumb_rate(self, version: str) -> tuple[int, int]:
        """Thumbs up, and all thumbs, on answers that a version began, without those of users in quarantine."""
        [row] = self._db.rows(
            "SELECT count(*) FILTER (WHERE f.value = 'UP') AS up, count(*) AS thumbs FROM feedback f "
            "JOIN responses r ON r.id = f.response_id WHERE f.kind = 'thumb' AND r.policy_version = ? "
            "AND f.user NOT IN (SELECT user FROM quarantined)",
            [version],
        )
        return int(row["up"]), int(row["thumbs"])

    def slot_order(self, limit: int = 10_000) -> dict[str, tuple[int, int]]:
        """For the hotter answer, the newer version's and the one that a reward model chose: in how many of the newest
        `limit` comparisons it was in slot A, and in how many there was such an answer."""
        [row] = self._db.rows(
            "SELECT count(*) FILTER (WHERE a.temperature > b.temperature) AS hotter_a, "
            "count(*) FILTER (WHERE a.temperature != b.temperature) AS hotter, "
            "count(*) FILTER (WHERE v.rowid > w.rowid) AS newer_a, "
            "count(*) FILTER (WHERE v.rowid != w.rowid) AS newer, "
            "count(*) FILTER (WHERE a.chosen_by IS NOT NULL AND b.chosen_by IS NULL) AS chosen_a, "
            "count(*) FILTER (WHERE (a.chosen_by IS NULL) != (b.chosen_by IS NULL)) AS chosen "
            "FROM (SELECT * FROM comparisons WHERE blind = 1 ORDER BY rowid DESC LIMIT ?) c "
            "JOIN responses a ON a.id = c.response_a JOIN responses b ON b.id = c.response_b "
            "LEFT JOIN policies v ON v.version = a.policy_version LEFT JOIN policies w ON w.version = b.policy_version",
            [limit],
        )
        return {name: (int(row[f"{name}_a"]), int(row[name])) for name in ("hotter", "newer", "chosen")}

    def rolled_back(self, before: float) -> set[str]:
        """Versions that were rolled back before a time, and not activated again before it. Going back to another model
        says nothing against a version."""
        rows = self._db.rows(
            "SELECT DISTINCT previous_version FROM pointer_events b JOIN policies p ON p.version = b.previous_version "
            "WHERE action = 'rollback' AND b.create_time < ?1 "
            "AND origin_version = (SELECT origin_version FROM policies WHERE version = b.version) "
            "AND NOT EXISTS (SELECT 1 FROM pointer_events WHERE version = b.previous_version AND seq > b.seq "
            "AND create_time < ?1)",
            [before],
        )
        return {str(row["previous_version"]) for row in rows}


def _improver(row: Row) -> str:
    return str(stored_round.SETTINGS.load(row["settings"]).get("improver", ""))


def _start(row: Row) -> str | None:
    """What the weights of a version, with its round's settings, began as; None for a model's own."""
    started_from = stored_round.start_from(stored_round.SETTINGS.load(row["settings"]))
    start = row["parent_version" if started_from == "active" else "reference_version"]
    return None if start == row["version"] else start

"""What a round reads: the votes that were current at one event, and users' prompts."""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable

from server.store.chats.loading import load_comparisons, load_responses
from server.store.chats.machine_choices import Asked, MachineChoices
from server.store.chats.records import ChoiceVote, Correction, Demonstration, Prompt, Snapshot, ThumbVote
from server.store.chats.reviews import review_key
from server.store.database import UNLIMITED, Database, Row, pages
from server.store.deletion import Deletion
from server.store.learning.rounds import Rounds
from server.store.packing import unpack_ints

# SQL, on `feedback_events e`: not replaced, retracted or deleted by an event up to the one bound to the placeholder.
CURRENT = (
    "action = 'submit' AND value IS NOT NULL AND NOT EXISTS "
    "(SELECT 1 FROM feedback_events WHERE feedback_id = e.feedback_id AND seq > e.seq AND seq <= ?)"
)
# Nobody asks for more, and operators' pages ask often.
MOST_COUNTED = 1_000_000
# A round's prompts are chosen among so many of the newest responses, so that the time for it is bounded.
RECENT = 1_000_000


class Snapshots:
    """Reads of all users' votes and prompts."""

    def __init__(self, database: Database, deletion: Deletion, rounds: Rounds, machine: MachineChoices) -> None:
        self._db = database
        self._deletion = deletion
        self._rounds = rounds
        self._machine = machine

    def watermark(self) -> int:
        """The number of the newest feedback event; 0 before the first. No smaller one is stored later."""
        with self._db.settled():
            return int(self._db.rows("SELECT coalesce(max(seq), 0) AS seq FROM feedback_events")[0]["seq"])

    def count_votes(self, after: int = 0, most: int = UNLIMITED) -> int:
        """How many current choices, thumbs and corrections were given or changed after the event `after`, at most
        `most`."""
        # Uses only the index feedback_by_event, since operators' pages poll it.
        [row] = self._db.rows(
            "SELECT count(*) AS votes FROM "
            "(SELECT 1 FROM feedback WHERE event_seq > ? AND kind != 'demonstration' LIMIT ?) AS counted",
            [after, most],
        )
        return int(row["votes"])

    def votes_changed(self, after: int) -> bool:
        """Whether a choice, thumb or correction was given, changed, retracted or deleted after the event `after`."""
        sql = "SELECT 1 FROM feedback_events WHERE seq > ? AND kind != 'demonstration' LIMIT 1"
        return self._db.row(sql, [after]) is not None

    def count_examples(self, after: int = 0) -> dict[str, int]:
        """How many current demonstrations and corrections each user gave or changed after the event `after`; without
        users in quarantine."""
        rows = self._db.rows(
            "SELECT user, count(*) AS examples FROM feedback WHERE event_seq > ? "
            "AND kind IN ('demonstration', 'correction') AND user NOT IN (SELECT user FROM quarantined) GROUP BY user",
            [after],
        )
        return {row["user"]: row["examples"] for row in rows}

    def votes_of(self, users: Collection[str], watermark: int) -> int:
        """How much feedback of these users was current at `watermark`, including demonstrations."""
        [row] = self._db.rows(
            f"SELECT count(*) AS votes FROM feedback_events e WHERE seq <= ? AND {self._db.AMONG} AND {CURRENT}",
            [watermark, json.dumps(list(users)), watermark],
        )
        return int(row["votes"])

    def count_new_votes(self) -> int:
        """How many current votes no round of the active version's reference has learned from yet, at most
        MOST_COUNTED."""
        learned = self._rounds.last_learned()
        return self.count_votes(after=learned.watermark if learned else 0, most=MOST_COUNTED)

    def take(
        self,
        watermark: int | None = None,
        limit: int = UNLIMITED,
        without: Collection[str] = (),
        judge: str = "",
        machine_watermark: int | None = None,
    ) -> Snapshot:
        """Feedback that was current at `watermark` (default: now) and was not deleted since, except that of users in
        `without`: the newest `limit` votes, and every demonstration. With the choices of a machine judge, if one is
        named, up to its own watermark, except those about users in `without`."""
        machine_watermark = self._machine.watermark() if machine_watermark is None else machine_watermark
        deletions = self._deletion.deletions()
        watermark = self.watermark() if watermark is None else watermark
        left_out = json.dumps(list(without))
        # Exclude users before the limit, or their votes would still displace those of others.
        events = self._db.rows(
            f"SELECT * FROM feedback_events e WHERE seq <= ? AND kind != 'demonstration' AND NOT {self._db.AMONG} "
            f"AND {CURRENT} ORDER BY seq DESC LIMIT ?",
            [watermark, left_out, watermark, limit],
        )
        demonstrations = self._db.rows(
            f"SELECT * FROM feedback_events e WHERE seq <= ? AND kind = 'demonstration' AND NOT {self._db.AMONG} "
            f"AND {CURRENT} ORDER BY seq",
            [watermark, left_out, watermark],
        )
        by_kind: dict[str, list[Row]] = defaultdict(list)
        for event in reversed(events):
            by_kind[event["kind"]].append(event)
        return Snapshot(
            watermark=watermark,
            choices=self._choices(by_kind["choice"]),
            thumbs=self._thumbs(by_kind["thumb"]),
            corrections=self._corrections(by_kind["correction"]),
            demonstrations=[
                Demonstration(
                    event["feedback_id"], event["user"], json.loads(event["value"]), event["create_time"], event["seq"]
                )
                for event in demonstrations
            ],
            machine=self._machine_votes(judge, machine_watermark, without) if judge else [],
            machine_watermark=machine_watermark,
            judge=judge,
            deletions=deletions,
        )

    def prompts(
        self, before: float | None = None, limit: int = UNLIMITED, without: Collection[str] = ()
    ) -> list[Prompt]:
        """Users' prompts, distinct within a lineage, in the order in which they were first asked, except those of users
        in `without`. At most `limit` of the RECENT newest responses created before `before` count: every user's newest,
        then every user's second, and so on."""
        rows = self._db.rows(
            "WITH recent AS (SELECT rowid AS number, user FROM responses "
            f"WHERE create_time < ? AND NOT {self._db.AMONG} "
            # A review's prompt was asked elsewhere.
            "AND conversation_id NOT IN (SELECT id FROM conversations WHERE kind = 'review') "
            "ORDER BY rowid DESC LIMIT ?), "
            "placed AS (SELECT number, row_number() OVER (PARTITION BY user ORDER BY number DESC) AS place "
            "FROM recent), "
            "chosen AS (SELECT number FROM placed ORDER BY place, number DESC LIMIT ?), "
            # The same ids are another text in another lineage.
            "asked AS (SELECT r.id AS response_id, r.policy_version, r.conversation_id, r.user, r.prompt_token_ids, "
            "r.max_tokens, r.stop, number AS first, "
            "row_number() OVER (PARTITION BY r.prompt_token_ids, origin_version ORDER BY number) AS nth "
            "FROM chosen JOIN responses r ON r.rowid = number LEFT JOIN policies ON version = r.policy_version) "
            "SELECT *, first = (SELECT min(rowid) FROM responses WHERE conversation_id = asked.conversation_id) "
            # A caller's own history may begin with turns that were answered elsewhere.
            "AND (SELECT given_answer FROM turns WHERE conversation_id = asked.conversation_id ORDER BY seq LIMIT 1) "
            "IS NULL AS opens, "
            "(SELECT message FROM turns WHERE conversation_id = asked.conversation_id ORDER BY seq LIMIT 1) "
            "AS opening, (SELECT system FROM conversations WHERE id = asked.conversation_id) AS system "
            "FROM asked WHERE nth = 1 ORDER BY first",
            [math.inf if before is None else before, json.dumps(list(without)), RECENT, limit],
        )
        openers: dict[str, str] = {}
        return [
            Prompt(
                row["conversation_id"],
                unpack_ints(row["prompt_token_ids"]),
                row["max_tokens"],
                row["user"],
                openers.setdefault(row["opening"], row["conversation_id"]) if row["opens"] else "",
                row["opening"] if row["opens"] else "",
                row["response_id"],
                row["policy_version"],
                row["system"],
                tuple(json.loads(row["stop"])),
            )
            for row in rows
        ]

    def _choices(self, events: list[Row]) -> list[ChoiceVote]:
        comparisons = load_comparisons(self._db, (event["comparison_id"] for event in events))
        review_of = self._reviewed(comparisons)
        return [
            ChoiceVote(
                event["feedback_id"],
                event["user"],
                event["value"],
                comparison.id,
                comparison.a,
                comparison.b,
                event["create_time"],
                review_of.get(comparison.id, ""),
            )
            for event in events
            if (comparison := comparisons.get(event["comparison_id"]))
        ]

    def voted_with(self, asked: Collection[Asked]) -> dict[str, str]:
        """By comparison, what votes on it have in common with others, which decides whether they train or judge."""
        review_of = self._reviewed(one.comparison_id for one in asked)
        return {one.comparison_id: review_of.get(one.comparison_id) or one.conversation_id for one in asked}

    def _machine_votes(self, judge: str, watermark: int, without: Collection[str]) -> list[ChoiceVote]:
        said = self._machine.all(judge, watermark, without)
        review_of = self._reviewed(one.comparison.id for one in said)
        return [
            ChoiceVote(
                one.feedback_id,
                judge,
                one.choice,
                one.comparison.id,
                one.comparison.a,
                one.comparison.b,
                one.comparison.create_time,
                review_of.get(one.comparison.id, ""),
            )
            for one in said
            if one.choice
        ]

    def _reviewed(self, comparison_ids: Iterable[str]) -> dict[str, str]:
        """For the comparisons that are reviews, what all reviews of their prompt have in common."""
        return {
            row["comparison_id"]: row["conversation_id"] or review_key(json.loads(row["messages"]))
            for page in pages(comparison_ids)
            for row in self._db.rows(
                "SELECT comparison_id, conversation_id, messages FROM reviewed "
                f"JOIN reviews ON seq = review_seq WHERE comparison_id IN ({', '.join('?' for _ in page)})",
                page,
            )
        }

    def _thumbs(self, events: list[Row]) -> list[ThumbVote]:
        responses = load_responses(self._db, (event["response_id"] for event in events))
        return [
            ThumbVote(
                event["feedback_id"], event["user"], 1 if event["value"] == "UP" else -1, response, event["create_time"]
            )
            for event in events
            if (response := responses.get(event["response_id"]))
        ]

    def _corrections(self, events: list[Row]) -> list[Correction]:
        responses = load_responses(self._db, (event["response_id"] for event in events))
        return [
            Correction(
                event["feedback_id"], event["user"], event["value"], response, event["create_time"], event["seq"]
            )
            for event in events
            if (response := responses.get(event["response_id"]))
        ]

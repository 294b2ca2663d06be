"""How the cost of what people do, and of a round's first reads, grows with the votes in PostgreSQL.

    python benchmarks/growth_postgres.py --work-dir DIR [--votes 1000 10000 100000 1000000 10000000] [--write]

A PostgreSQL server of its own, with its data in the work directory, grows from size to size by COPY: conversations of
ten answers of 16 tokens, each with a thumb by one of 100,000 users, and with the row that finds a repeated request. At
every size, after ANALYZE, a separate process measures through the store, as a server and a learner use it: a vote, a
page of a conversation, a user's list of conversations; counting the new votes, the snapshot of the newest 20,000 votes
and the users' prompts for a round, with the process's peak memory. Ten million votes take about 25 GB. Prints one JSON
line last; `--write` writes docs/benchmarks/growth-postgres.md.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
from kept import measured_apart

from server.store.packing import pack_floats, pack_ints
from server.store.store import Store
from tests.postgres import postgres_server

REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "growth-postgres.md"
USERS, TURNS, TOKENS, PROMPT = 100_000, 10, 16, 40
# Votes of one COPY, whose transaction a killed run loses.
BATCH = 100_000
REPEATS = 100
BYTES_PER_VOTE = 3_000
BEGAN = 1.7e9
# PostgreSQL as it would be set on a machine of this size; all that is durable stays on.
SETTINGS = ("shared_buffers=2GB", "max_wal_size=4GB", "checkpoint_timeout=15min", "work_mem=64MB")
FIGURES = {
    "vote_ms": "a vote, ms",
    "page_ms": "a page of a conversation, ms",
    "list_ms": "a user's conversations, ms",
    "count_s": "new votes counted, s",
    "snapshot_s": "snapshot, s",
    "prompts_s": "prompts, s",
    "peak_mib": "peak memory, MiB",
    "gib": "on disk, GiB",
    "fill_s": "filled, s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--votes", type=int, nargs="+", default=[10**power for power in range(3, 8)])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--measure", type=int, metavar="VOTES", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.work_dir, arguments.measure)))
        return
    found = grow(arguments.work_dir.resolve(), sorted(arguments.votes))
    if arguments.write:
        REPORT.write_text(page(found), encoding="utf-8")
    print(json.dumps({"benchmark": "growth_postgres", "votes": found}))


def grow(work: Path, sizes: list[int]) -> dict[int, dict[str, float]]:
    """The figures at each number of votes."""
    work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(work).free < BYTES_PER_VOTE * sizes[-1]:
        sys.exit(f"{sizes[-1]:,} votes need {BYTES_PER_VOTE * sizes[-1] / 1e9:.0f} GB in {work}.")
    found: dict[int, dict[str, float]] = {}
    with postgres_server(*SETTINGS, place=work) as server:
        url = server.create()
        have = 0
        for number, votes in enumerate(sizes):
            started = time.perf_counter()
            for first in range(have, votes, BATCH):
                fill(url, range(first, min(first + BATCH, votes)), number * REPEATS)
                say(f"{min(first + BATCH, votes):,} votes after {time.perf_counter() - started:.0f} s")
            have = votes
            server.command("VACUUM (ANALYZE)", url)
            seconds = time.perf_counter() - started
            command = [sys.executable, __file__, "--work-dir", str(work), "--measure", str(votes)]
            measured = measured_apart(command, os.environ | {"PREFLOOP_STORE_URL": url})
            found[votes] = {**measured, "fill_s": seconds}
            say(json.dumps({"votes": votes} | found[votes]))
    return found


def fill(url: str, numbers: range, measured: int) -> None:
    """Add what one vote per number leaves, in one transaction, after as many `measured` ones."""
    conversations = range(-(-numbers.start // TURNS), -(-numbers.stop // TURNS))
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        for table, (columns, line) in tables(measured).items():
            lines = map(line, conversations if table == "conversations" else numbers)
            with cursor.copy(f"COPY {table} ({columns}) FROM STDIN".encode()) as copy:
                for block in blocks(lines):
                    copy.write(block)
        for table, number in (("feedback_events", "seq"), ("turns", "seq"), ("responses", "rowid")):
            newest = numbers.stop + measured
            cursor.execute(f"SELECT setval(pg_get_serial_sequence('{table}', '{number}'), {newest})".encode())


def tables(measured: int) -> dict[str, tuple[str, Callable[[int], str]]]:
    """Of each table the columns, and the line of COPY's text format of the nth vote, or the nth conversation."""
    prompt, answer = (rf"\\x{packed.hex()}" for packed in (pack_ints([7] * PROMPT), pack_ints([9] * TOKENS)))
    logprobs, body = rf"\\x{pack_floats([-1.0] * TOKENS).hex()}", rf"\\x{bytes(32).hex()}"
    result = rf"\\x{bytes(90).hex()}"
    text = "word " * TOKENS
    return {
        "conversations": (
            'id, "user", title, create_time, update_time',
            lambda n: f"{conversation(n)}\t{user(n)}\tWhat is new?\t{BEGAN + n}\t{BEGAN + n}\n",
        ),
        "responses": (
            'id, conversation_id, "user", replica_id, status, prompt_token_ids, token_ids, logprobs, text, temperature,'
            " max_tokens, finish_reason, policy_version, create_time, finish_time, rowid",
            lambda n: (
                f"{response(n)}\t{conversation(n // TURNS)}\t{user(n // TURNS)}\tr\tfinished\t{prompt}\t{answer}"
                f"\t{logprobs}\t{text}\t0.85\t{TOKENS}\tlength\tv0000\t{BEGAN + n}\t{BEGAN + n}\t{n + 1}\n"
            ),
        ),
        "spans": (
            'response_id, start, "end", policy_version, stale_kv',
            lambda n: f"{response(n)}\t0\t{TOKENS}\tv0000\t0\n",
        ),
        "turns": (
            "seq, conversation_id, message, response_id, dropped, create_time, parent_seq",
            lambda n: (
                f"{n + 1}\t{conversation(n // TURNS)}\tWhat is new?\t{response(n)}\t0\t{BEGAN + n}"
                f"\t{n if n % TURNS else chr(92) + 'N'}\n"
            ),
        ),
        "feedback_events": (
            'seq, action, feedback_id, "user", kind, response_id, value, comment, create_time',
            lambda n: (
                f"{n + measured + 1}\tsubmit\t{feedback(n)}\t{user(n // TURNS)}\tthumb\t{response(n)}\t{thumb(n)}"
                f"\t\t{BEGAN + n}\n"
            ),
        ),
        "feedback": (
            'id, event_seq, "user", kind, response_id, value, comment, create_time',
            lambda n: (
                f"{feedback(n)}\t{n + measured + 1}\t{user(n // TURNS)}\tthumb\t{response(n)}\t{thumb(n)}"
                f"\t\t{BEGAN + n}\n"
            ),
        ),
        "requests": (
            '"user", rpc, request_id, body_sha256, result, create_time, target',
            lambda n: (
                f"{user(n // TURNS)}\tSubmitThumb\t{n * 0x9E3779B97F4A7C15 & (2**64 - 1):032x}\t{body}\t{result}"
                f"\t{BEGAN + n}\t{response(n)}\n"
            ),
        ),
    }


def user(number: int) -> str:
    """Of the nth conversation."""
    return f"user{number * 7919 % USERS}"


def conversation(number: int) -> str:
    return f"conv_{number:024x}"


def response(number: int) -> str:
    return f"resp_{number:024x}"


def feedback(number: int) -> str:
    return f"fb_{number:024x}"


def thumb(number: int) -> str:
    return "UP" if number % 3 else "DOWN"


def blocks(lines: Iterator[str]) -> Iterator[bytes]:
    """The lines, many at a time."""
    block: list[str] = []
    for line in lines:
        block.append(line)
        if len(block) == 1000:
            yield "".join(block).encode()
            block.clear()
    yield "".join(block).encode()


def measure(work: Path, votes: int) -> dict[str, float]:
    """Milliseconds of calls (medians), seconds of a round's reads, and the database's size."""
    from learner.settings import LearnerSettings

    settings, draw = LearnerSettings(), random.Random(votes)
    with closing(Store.open(work / "data")) as store:

        def median_ms(work: Callable[[int], object]) -> float:
            took = []
            for number in range(REPEATS):
                started = time.perf_counter()
                work(number)
                took.append(time.perf_counter() - started)
            return 1000 * statistics.median(took)

        def vote(number: int) -> None:
            n = draw.randrange(votes)
            with store.transaction():
                given = store.feedback.submit_thumb(user(n // TURNS), response(n), up=bool(number % 2))
                about = given.response_id
                store.requests.remember(user(n // TURNS), "SubmitThumb", f"{votes}-{number}", b"x", b"y", about)

        def page_of(number: int) -> None:
            n = draw.randrange(votes // TURNS)
            turns = store.conversations.turns(user(n), conversation(n), 200)
            assert len(turns) == TURNS
            store.feedback.on_turns(user(n), turns)

        def seconds(work: Callable[[], object]) -> float:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started

        found = {
            "vote_ms": median_ms(vote),
            "page_ms": median_ms(page_of),
            "list_ms": median_ms(lambda number: store.conversations.page(user(draw.randrange(votes // TURNS)), 51)),
            "count_s": seconds(store.snapshots.count_new_votes),
            "snapshot_s": seconds(lambda: store.snapshots.take(limit=settings.max_votes)),
            "prompts_s": seconds(lambda: store.snapshots.prompts(limit=settings.max_prompts)),
        }
        return {**found, "gib": store.bytes() / 2**30}


def page(found: dict[int, dict[str, float]]) -> str:
    """The page in docs/benchmarks."""
    lines = [
        "# What people and rounds cost as votes grow in PostgreSQL",
        "",
        "`python benchmarks/growth_postgres.py --work-dir DIR --write`. PostgreSQL and its client share two cores",
        f"and a disk. Medians of {REPEATS} calls, each vote committed to disk; a round's reads once. Each size is",
        "filled from the one before.",
        "",
        "| votes | " + " | ".join(FIGURES.values()) + " |",
        "|---:|" + "---:|" * len(FIGURES),
    ]
    for votes, one in found.items():
        cells = [f"{one[name]:.{0 if name in ('peak_mib', 'fill_s') else 2}f}" for name in FIGURES]
        lines.append(f"| {votes:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""No byte of deleted data is left in the database's files or in rounds' files."""

import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.store.chats.records import Generation, Span
from server.store.files.residue import ANSWERS, cache_directory, erase, sweep
from server.store.sqlite.database import SqliteDatabase
from server.store.store import Store
from tests.server.store.conftest import on_sqlite
from tests.server.store.test_deletion import forget

SECRET = b"quixotic"
SEED = 0


def bytes_of(data_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(data_dir.rglob("*")) if path.is_file())


def fill(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Months of two users whose rows share pages: texts of all lengths that grow, change and are deleted."""
    draw = random.Random(SEED)
    # The ids decide which rows share a page. At first they were in no order, and such rows are still there.
    halves = (half for _ in itertools.count() for half in divmod(draw.randrange(2**96), 2**48))
    monkeypatch.setattr("server.store.ids.time", SimpleNamespace(time_ns=lambda: next(halves) * 1_000_000))
    monkeypatch.setattr("server.store.ids.secrets", SimpleNamespace(token_hex=lambda size: f"{next(halves):012x}"))
    conversations: dict[str, list[str]] = {"ann": [], "bob": []}
    for number in range(300):
        user = draw.choice(["ann", "bob"])

        def text(user: str = user) -> str:
            word = SECRET.decode() if user == "ann" else "public"
            return " ".join(f"{word}{draw.randrange(10**6):06d}" for _ in range(draw.choice([1, 3, 20, 60, 200, 800])))

        if not conversations[user] or draw.random() < 0.4:
            conversations[user].append(store.conversations.create(user, text()))
        response_id = store.responses.begin(
            user, draw.choice(conversations[user]), message=text(), replica_id="here", policy_version="v0000",
            prompt_token_ids=list(range(draw.randrange(200))), temperature=0.8, max_tokens=9, seed=None,
        )  # fmt: skip
        store.responses.finish(response_id, Generation([1, 2], [-0.5, -0.5], text(), "stop", [Span(0, 2, "v0000")]))
        given = store.feedback.submit_thumb(user, response_id, up=True, comment=text())
        if draw.random() < 0.3:
            store.feedback.submit_thumb(user, response_id, up=False, comment=text())
        if draw.random() < 0.3:
            store.feedback.retract(user, given.id)
        store.feedback.submit_correction(user, response_id, text())
        store.requests.remember(user, "Chat", f"{number}", b"x" * 32, text().encode(), response_id)


@on_sqlite
def test_rows_that_moved_leave_copies_which_a_rewrite_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path)
    fill(store, monkeypatch)
    assert bytes_of(tmp_path).count(SECRET) > 10_000
    forget(store, "ann")
    assert erase(tmp_path)
    # SQLite's own overwriting is not enough, so the file is rewritten.
    left = bytes_of(tmp_path).count(SECRET)
    assert 0 < left < 1_000
    assert erase(tmp_path, rewrite=True)
    assert bytes_of(tmp_path).count(SECRET) == 0
    assert bytes_of(tmp_path).count(b"public") > 10_000
    # Once is enough until the next deletion.
    assert store.deletion.rewrite_due() == 0
    store.conversations.delete("bob", store.conversations.page("bob", 1)[0].id)
    assert store.deletion.rewrite_due() > 0
    store.close()


@on_sqlite
def test_a_reader_that_keeps_the_log_is_reported(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    conversation_id = store.conversations.create("ann", SECRET.decode())
    reader = SqliteDatabase(tmp_path / "prefloop.db")
    reader.execute("BEGIN")
    assert len(reader.rows("SELECT * FROM conversations")) == 1
    store.conversations.delete("ann", conversation_id)
    database = SqliteDatabase(tmp_path / "prefloop.db")
    assert not database.empty_log(seconds=0.0)
    assert SECRET in (tmp_path / "prefloop.db-wal").read_bytes()
    reader.execute("COMMIT")
    assert database.empty_log(seconds=0.0)
    assert (tmp_path / "prefloop.db-wal").stat().st_size == 0
    reader.close()
    database.close()
    store.close()
    assert SECRET not in bytes_of(tmp_path)


def line(conversation_id: str, text: str) -> str:
    return f'{{"conversation_id": "{conversation_id}", "prompt": "{text}"}}\n'


def page(conversations: str) -> str:
    return f'<meta name="conversations" content="{conversations}"><p>{SECRET.decode()}'


def test_rounds_files_lose_what_came_from_deleted_conversations(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    gone, kept = store.conversations.create("ann", "a"), store.conversations.create("ann", "b")
    first, second, older = (tmp_path / "rounds" / name for name in ("round_1", "round_2", "round_3"))
    for directory in (first, second, older):
        directory.mkdir(parents=True)
    ours = line("", "a question of ours")
    (first / "answers.jsonl").write_text(line(gone, SECRET.decode()) + ours + line(kept, "kept"))
    (first / "report.html").write_text(page(f"{kept} {gone}"))
    (second / "answers.jsonl").write_text(line(kept, "kept"))
    (second / "report.html").write_text(page(kept))
    # Files of an older version, which name no conversation, and a line truncated by a kill.
    (older / "answers.jsonl").write_text(f'{{"prompt": "{SECRET.decode()}"}}\n{{"conversation_id": "{kept}')
    (older / "report.html").write_text(f"<p>{SECRET.decode()}")
    (older / "report.json").write_text("{}")
    store.conversations.delete("ann", gone)
    erase(tmp_path)
    assert (first / "answers.jsonl").read_text() == ours + line(kept, "kept")
    assert not (first / "report.html").exists()
    assert (second / "answers.jsonl").read_text() == line(kept, "kept")
    assert (second / "report.html").exists()
    assert (older / "answers.jsonl").read_text() == ""
    assert [path.name for path in sorted(older.iterdir())] == ["answers.jsonl", "report.json"]
    store.close()


def test_features_cached_before_a_deletion_are_removed(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    conversation_id = store.conversations.create("ann", "a")
    before = cache_directory(tmp_path, store.snapshots.take().deletions)
    before.mkdir(parents=True)
    (before / "features.db").write_bytes(b"1")
    (before.parent / "features-from-an-older-release.db").write_bytes(b"1")
    sweep(tmp_path)
    assert list(before.parent.iterdir()) == [before]
    store.conversations.delete("ann", conversation_id)
    sweep(tmp_path)
    assert list(before.parent.iterdir()) == []
    # A learner that read its votes before the deletion writes after it.
    before.mkdir()
    after = cache_directory(tmp_path, store.snapshots.take().deletions)
    after.mkdir()
    sweep(tmp_path)
    assert list(before.parent.iterdir()) == [after]
    store.close()


def test_partial_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    folder = tmp_path / "rounds" / "round_1"
    (folder / ".state-001.x.partial").mkdir(parents=True)
    (folder / f".{ANSWERS}.partial").write_text("what somebody said", encoding="utf-8")
    sweep(tmp_path)
    # A partial state names no conversation, and its learner resumes from others.
    assert [path.name for path in folder.iterdir()] == [".state-001.x.partial"]

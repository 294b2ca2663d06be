"""Removes what deleted rows leave behind: copies in files beside the database, and bytes in the database's own files.

There is one rule for files: what a round stores names the conversations it came from, and is removed when one of them
is deleted. So `sweep` does not need to know what was deleted, and may run at any time: after a deletion, after the
learner wrote such a file (a deletion may have come in between), and every hour in case a process was killed in between.

SQLite overwrites what it frees (`secure_delete`), but not the copies that stay in a page's unused middle when rows move
to another page. Only rewriting the file drops these, and writes wait for that.
"""

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from server.store.store import Store

# The beginning of a line of ANSWERS, and the element of REPORT that names the conversations it quotes.
LINE = re.compile(rb'\{"conversation_id": "(\w*)"')
PAGE = re.compile(rb'<meta name="conversations" content="([\w ]*)">')
ANSWERS, REPORT = "answers.jsonl", "report.html"


def erase(data_dir: Path, *, rewrite: bool = False) -> bool:
    """Remove what deletions left; with `rewrite`, also rewrite the database if that is due. False if another process
    kept the database's log from being emptied: it may still have deleted content."""
    sweep(data_dir)
    with closing(Store.open(data_dir)) as store:
        return store.free_files(rewrite=rewrite)


def sweep(data_dir: Path) -> None:
    """Remove, from rounds' files, everything that came from deleted conversations."""
    with keeping(data_dir), closing(Store.open(data_dir)) as store:
        now = cache_directory(data_dir, store.deletion.deletions())
        for path in now.parent.glob("*"):
            if path != now:
                _remove(path)
        # Partial files of killed writers; nobody writes now.
        for path in data_dir.glob("rounds/*/.*.partial"):
            if path.is_file():
                path.unlink()
        for path in data_dir.glob(f"rounds/*/{ANSWERS}"):
            lines = path.read_bytes().splitlines(keepends=True)
            named = [(match := LINE.match(line)) and match[1] for line in lines]
            gone = _gone(store, {name for name in named if name})
            kept = [line for line, name in zip(lines, named, strict=True) if name is not None and name not in gone]
            if len(kept) < len(lines):
                path.write_bytes(b"".join(kept))
        for path in data_dir.glob(f"rounds/*/{REPORT}"):
            quoted = PAGE.search(path.read_bytes())
            # A report without the element is from an older version; `learner report` creates it again.
            if quoted is None or _gone(store, set(quoted[1].split())):
                path.unlink()


def cache_directory(data_dir: Path, deletions: int) -> Path:
    """The folder of cached features for this number of deletions. Features are computed from users' text and do not say
    whose, so after a deletion all of them are computed again."""
    return data_dir / "cache" / str(deletions)


@contextmanager
def keeping(data_dir: Path) -> Iterator[None]:
    """Hold the lock under which one process at a time writes or sweeps rounds' files."""
    with (data_dir / ".keeping").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _gone(store: Store, names: set[bytes]) -> set[bytes]:
    """Those of the conversations that no longer exist."""
    there = store.conversations.existing(name.decode() for name in names)
    return names - {name.encode() for name in there}


def _remove(path: Path) -> None:
    if path.is_dir():
        # A learner may be writing there; what it adds in the meantime is removed when it sweeps.
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

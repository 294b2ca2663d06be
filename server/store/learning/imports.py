"""Preferences of other people, imported from files: what they chose between two answers to a prompt.

They belong to no user here. An import has a name, by which it is counted and removed as one.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from server.shared.errors import ConflictError, NotFoundError
from server.store.database import Database


@dataclass(frozen=True)
class ImportedPreference:
    """One answer was preferred over another. The prompt is [{"role": ..., "content": ...}, ...], the user's last."""

    prompt: list[dict[str, str]]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Import:
    """One file that was imported."""

    name: str
    source: str
    preferences: int
    create_time: float


class Imports:
    """Reads and writes of imports."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def add(self, name: str, source: str, preferences: Iterable[ImportedPreference]) -> int:
        """Store an import, whole or not at all; returns the number of its preferences. Raises ConflictError if the name
        is taken, and whatever `preferences` raises."""
        with self._db.write():
            if self._db.row("SELECT 1 FROM imports WHERE name = ?", [name]):
                raise ConflictError(f"There is an import {name!r} already: remove it first, or choose another name.")
            row = {"name": name, "source": source, "create_time": self._db.now()}
            number, count = self._db.insert("imports", row), 0
            for one in preferences:
                prompt = json.dumps(one.prompt, ensure_ascii=False)
                self._db.insert(
                    "imported_preferences",
                    {"import_id": number, "prompt": prompt, "chosen": one.chosen, "rejected": one.rejected},
                )
                count += 1
            return count

    def remove(self, name: str) -> int:
        """Delete an import; returns the number of its preferences. Raises NotFoundError."""
        with self._db.write():
            row = self._db.row("SELECT id FROM imports WHERE name = ?", [name])
            if row is None:
                raise NotFoundError("import", name)
            removed = self._db.execute("DELETE FROM imported_preferences WHERE import_id = ?", [row["id"]])
            self._db.execute("DELETE FROM imports WHERE id = ?", [row["id"]])
            return removed

    def all(self) -> list[Import]:
        """Oldest first."""
        rows = self._db.rows(
            "SELECT name, source, create_time, (SELECT count(*) FROM imported_preferences WHERE import_id = i.id) "
            "AS preferences FROM imports i ORDER BY id"
        )
        return [Import(**row) for row in rows]

    def preferences(self, limit: int) -> list[ImportedPreference]:
        """At most `limit` preferences, evenly spaced over all imports together."""
        [row] = self._db.rows("SELECT count(*) AS n FROM imported_preferences")
        every = max(-(-row["n"] // limit), 1)
        rows = self._db.rows(
            "SELECT prompt, chosen, rejected FROM (SELECT *, row_number() OVER (ORDER BY id) - 1 AS place "
            "FROM imported_preferences) AS placed WHERE place % ? = 0 ORDER BY id",
            [every],
        )
        return [ImportedPreference(json.loads(row["prompt"]), row["chosen"], row["rejected"]) for row in rows]

"""Which versions are in shared storage, where, and what their manifests must be."""

from dataclasses import dataclass
from typing import Literal

from server.store.database import Database
from server.store.ids import new_id
from server.store.learning.leases import check_fence
from server.store.learning.records import Lease

Folder = Literal["policies", "reward_models"]


@dataclass(frozen=True)
class Shared:
    """Where a version is in shared storage, and the SHA-256 of its manifest."""

    object: str
    manifest_sha256: str


class SharedVersions:
    """Reads and writes of these rows."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def find(self, folder: Folder, version: str) -> Shared | None:
        row = self._db.row(
            "SELECT object, manifest_sha256 FROM shared_versions WHERE folder = ? AND version = ?", [folder, version]
        )
        return Shared(**row) if row else None

    def claim(self, folder: Folder, version: str, shared: Shared, *, fence: Lease | None = None) -> Shared:
        """Say where the version is; returns what holds, which is another's if that came first."""
        with self._db.write():
            check_fence(self._db, fence)
            if known := self.find(folder, version):
                return known
            row = {"folder": folder, "version": version, "object": shared.object}
            self._db.insert("shared_versions", {**row, "manifest_sha256": shared.manifest_sha256})
            return shared

    def versions(self, folder: Folder) -> set[str]:
        return {
            row["version"] for row in self._db.rows("SELECT version FROM shared_versions WHERE folder = ?", [folder])
        }

    def objects(self) -> set[str]:
        """Where all of them are."""
        return {row["object"] for row in self._db.rows("SELECT object FROM shared_versions")}

    def identity(self) -> str:
        """The name of this store in shared storage: what is below another name is another's. A copy gets its own."""
        sql = "SELECT name FROM identity"
        if row := self._db.row(sql):
            return str(row["name"])
        with self._db.write():
            if not self._db.row(sql):
                self._db.insert("identity", {"id": 1, "name": new_id("store")})
            return str(self._db.rows(sql)[0]["name"])

    def forget_identity(self) -> None:
        """For a copy of a store."""
        with self._db.write():
            self._db.execute("DELETE FROM identity")

    def remove(self, folder: Folder, version: str) -> None:
        with self._db.write():
            self._db.execute("DELETE FROM shared_versions WHERE folder = ? AND version = ?", [folder, version])

"""Shared storage of versions: an S3 bucket, or a folder that all mount.

Every upload has a name of its own, so nothing is ever overwritten, and no promise of the storage is needed about who
comes first. The manifest is uploaded last. Whoever reads knows the name and the manifest's sum from the database, and
trusts nothing else: a file that the manifest does not list with its sum is refused.
"""

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from server.shared.errors import UnavailableError
from server.shared.failpoints import failpoint
from server.store.files.manifest import MANIFEST, manifest_sha256, new_directory, read_manifest, sync, verify
from server.store.learning.shared_versions import Shared

# Files are read and written in parts of so many bytes.
PART = 16 * 2**20


class Storage:
    """The storage at a URL: `s3://bucket/prefix`, with credentials in AWS_* variables, or `file:///mnt/prefloop`. What
    it writes and removes is below the name of the `owner`, a store. Every method raises UnavailableError if the storage
    fails, or has something else than was uploaded."""

    def __init__(self, url: str, owner: str) -> None:
        self._url, self._owner = url, owner
        # A folder's files are synced here; S3 has them on disk when it answers.
        self._folder = Path(url.removeprefix("file://")) if url.startswith("file://") else None
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._store = from_url(url)

    def put(self, directory: Path) -> Shared:
        """Upload a published version."""
        manifest = verify(directory)
        name = f"{self._owner}/{directory.parent.name}/{directory.name}-{secrets.token_hex(8)}"
        with self._explained():
            for file in sorted(manifest.files):
                self._upload(directory / file, f"{name}/{file}")
            self._upload(directory / MANIFEST, f"{name}/{MANIFEST}")
        return Shared(name, manifest_sha256(directory))

    def fetch(self, shared: Shared, final: Path) -> None:
        """Download a version to `final`, whole and verified; it must not exist."""
        with self._explained(), new_directory(final) as staging:
            written = bytes(obstore.get(self._store, f"{shared.object}/{MANIFEST}").bytes())
            if hashlib.sha256(written).hexdigest() != shared.manifest_sha256:
                raise UnavailableError(f"{final.name} in {self._url} is not what was published: its manifest differs.")
            (staging / MANIFEST).write_bytes(written)
            for file, expected in read_manifest(staging).files.items():
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                found = self._download(f"{shared.object}/{file}", staging / file)
                if found != expected:
                    raise UnavailableError(f"{final.name} in {self._url} is not what was published: {file} differs.")
            if not (staging / MANIFEST).exists():
                raise UnavailableError(f"{final.name} was fetched by two at once; try again.")

    def remove(self, name: str) -> None:
        """Remove an upload of this owner, whole or not; of another's nothing. The manifest goes first, so that nothing
        takes the rest for a version."""
        if not name.startswith(f"{self._owner}/"):
            return
        with self._explained():
            files = [one["path"] for page in obstore.list(self._store, f"{name}/") for one in page]
            for file in sorted(files, key=lambda file: not file.endswith(f"/{MANIFEST}")):
                obstore.delete(self._store, file)

    def names(self, older_than: float = 0.0) -> set[str]:
        """The names of this owner's uploads, whole or not, of which the newest file is older than this many seconds."""
        now, newest = datetime.now(UTC), dict[str, datetime]()
        with self._explained():
            for page in obstore.list(self._store, f"{self._owner}/"):
                for one in page:
                    name = "/".join(one["path"].split("/")[:3])
                    newest[name] = max(newest.get(name, one["last_modified"]), one["last_modified"])
        return {name for name, time in newest.items() if (now - time).total_seconds() >= older_than}

    def _upload(self, path: Path, name: str) -> None:
        failpoint("put")
        with path.open("rb") as file:
            obstore.put(self._store, name, file, chunk_size=PART)
        if self._folder:
            sync(self._folder / name)

    def _download(self, name: str, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for part in obstore.get(self._store, name).stream(min_chunk_size=PART):
                digest.update(part)
                file.write(part)
        return digest.hexdigest()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            # The first line: others may quote a request's headers.
            reason = str(error).strip().partition("\n")[0]
            raise UnavailableError(f"The shared storage {self._url} cannot be used: {reason}") from error

"""The store, grouped by subject. Imports neither torch nor vllm, so the learner may use it.

A write is on disk when it returns; `transaction` groups several writes. Data of other users is not found.
"""

import importlib
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from types import ModuleType
from typing import Literal

from server.shared.errors import DataDirectoryError, FailedPreconditionError
from server.store.chats.conversations import Conversations
from server.store.chats.feedback import FeedbackTable
from server.store.chats.histories import Histories
from server.store.chats.machine_choices import MachineChoices
from server.store.chats.requests import Requests
from server.store.chats.responses import Responses
from server.store.chats.reviews import Reviews
from server.store.chats.snapshots import Snapshots
from server.store.copying import Copied, copy_store
from server.store.database import Database
from server.store.deletion import Deletion
from server.store.keys import Keys
from server.store.learning.canaries import Canaries
from server.store.learning.imports import Imports
from server.store.learning.leases import Leases
from server.store.learning.lineage import Lineage
from server.store.learning.policies import ACTIVE_ORIGIN, ACTIVE_REFERENCE, Policies
from server.store.learning.quarantine import Quarantine
from server.store.learning.records import Learner
from server.store.learning.replicas import Replicas
from server.store.learning.reward_models import RewardModels
from server.store.learning.round_requests import RoundRequests
from server.store.learning.rounds import Rounds
from server.store.learning.shared_versions import SharedVersions
from server.store.settings import StoreSettings
from server.store.sqlite.database import DATABASE, SqliteDatabase, peek


class Store:
    """One connection to a data directory's database, for one thread at a time."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self.policies = Policies(database)
        self.reward_models = RewardModels(database)
        self.rounds = Rounds(database, self.policies)
        self.replicas = Replicas(database)
        self.shared_versions = SharedVersions(database)
        self.leases = Leases(database)
        self.lineage = Lineage(database)
        self.canaries = Canaries(database, self.lineage)
        self.keys = Keys(database)
        self.quarantine = Quarantine(database)
        self.round_requests = RoundRequests(database)
        self.deletion = Deletion(database, self.lineage)
        self.conversations = Conversations(database, self.deletion)
        self.responses = Responses(database, self.replicas)
        self.histories = Histories(database, self.conversations)
        self.feedback = FeedbackTable(database, self.responses)
        self.reviews = Reviews(database, self.conversations, self.responses)
        self.requests = Requests(database)
        self.machine_choices = MachineChoices(database)
        self.imports = Imports(database)
        self.snapshots = Snapshots(database, self.deletion, self.rounds, self.machine_choices)

    @classmethod
    def open(cls, data_dir: Path) -> "Store":
        """Open the store of this data directory: at the setting `store_url`, or else in it. Creates or migrates it if
        needed. Raises DataDirectoryError."""
        if url := _store_url():
            return cls(_postgres().PostgresDatabase(url))
        return cls.open_file(data_dir)

    @classmethod
    def open_file(cls, data_dir: Path) -> "Store":
        """Open the store in a data directory, whatever the settings say."""
        return cls(SqliteDatabase(Path(data_dir) / DATABASE))

    @staticmethod
    def exists(data_dir: Path) -> bool:
        """Whether there is a store; `open` would create one. Raises DataDirectoryError if that cannot be told."""
        url = _store_url()
        return bool(_postgres().exists(url)) if url else (data_dir / DATABASE).exists()

    @staticmethod
    def describe_server(url: str) -> str:
        """The PostgreSQL that answers there and its version. Raises DataDirectoryError if it cannot be used."""
        return str(_postgres().describe(url))

    @staticmethod
    def peek_origin(data_dir: Path) -> str | None:
        """What the active version was made from a model as, read without creating or migrating the database; None if
        there is none, or it cannot be read. In an older database each reference was made from a model."""
        if url := _store_url():
            return _postgres().peek(url, ACTIVE_ORIGIN)  # type: ignore[no-any-return]
        return peek(data_dir / DATABASE, ACTIVE_ORIGIN) or peek(data_dir / DATABASE, ACTIVE_REFERENCE)

    @property
    def side_by_side(self) -> bool:
        """Whether several connections may write different users' data at the same time."""
        return self._db.SIDE_BY_SIDE

    def transaction(self) -> AbstractContextManager[None]:
        """Everything written inside becomes durable together or not at all."""
        return self._db.write()

    def reading(self) -> AbstractContextManager[None]:
        """Everything read inside is from one moment."""
        return self._db.reading()

    def group(self, users: Collection[str] | None = None) -> AbstractContextManager[None]:
        """The transactions inside stay separate, but share one commit. See `Database.group`."""
        return self._db.group(users)

    def copy_to(self, data_dir: Path) -> None:
        """Copy the database, as of one moment, to another data directory. Not durable until the caller syncs it. Raises
        DataDirectoryError if it is damaged."""
        if isinstance(self._db, SqliteDatabase):
            self._db.copy_to(data_dir / DATABASE)
            return
        with closing(SqliteDatabase(data_dir / DATABASE)) as copy, self.reading():
            for _ in copy_store(self._db, copy):
                pass

    @staticmethod
    def migrate(data_dir: Path, to: Literal["postgres", "sqlite"]) -> Iterator[Copied]:
        """Copy the store between a data directory and the setting `store_url`; see `copy_store`. Raises
        FailedPreconditionError while a server or a learner uses it."""
        url = _store_url()
        if not url:
            raise DataDirectoryError("Set store_url, as PREFLOOP_STORE_URL or in prefloop.toml, to the database.")
        file, server = Store.open_file(data_dir), Store(_postgres().PostgresDatabase(url))
        source, target = (file, server) if to == "postgres" else (server, file)
        with closing(file), closing(server):
            if alive := source.in_use():
                raise FailedPreconditionError("IN_USE", f"{alive} uses the store; stop it first.")
            yield from copy_store(source._db, target._db)

    def in_use(self) -> str | None:
        """A server or learner that is alive, or None."""
        for replica in self.replicas.alive():
            return f"server {replica.id}"
        learner = self.round_requests.at_work()
        return f"learner {learner}" if learner else "a learner" if self.round_requests.next_times() else None

    def free_files(self, *, rewrite: bool) -> bool:
        """Remove from the database's own files what deleted rows left; with `rewrite`, also rewrite them if due. False
        if another process keeps reading: deleted content may still be in the log."""
        due = self.deletion.rewrite_due() if rewrite else 0
        if due:
            if not self._db.rewrite():
                return False
            self.deletion.rewritten(due)
        return self._db.empty_log()

    def bytes(self) -> int:
        """Size of the database in bytes."""
        return self._db.bytes()

    def learner(self) -> Learner:
        """Whether a learner listens, which round runs, and the last request."""
        listening = self.round_requests.next_times()
        return Learner(
            listening=bool(listening),
            next_time=min((time for time in listening if time is not None), default=None),
            running=self.rounds.running() if self.round_requests.at_work() else None,
            new_votes=self.snapshots.count_new_votes(),
            request=self.round_requests.last(),
        )

    def close(self) -> None:
        self._db.close()


def _store_url() -> str:
    return StoreSettings.load().store_url.get_secret_value()


def _postgres() -> ModuleType:
    """What few need and load."""
    try:
        return importlib.import_module("server.store.postgres.database")
    except ImportError as error:
        raise DataDirectoryError("store_url needs the extra `postgres`: pip install 'prefloop[postgres]'.") from error

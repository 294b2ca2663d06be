"""Groups of writes with one commit, on any database: each write is a savepoint of the group's transaction."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from server.shared.errors import DatabaseError
from server.shared.failpoints import failpoint


class Transactions(ABC):
    """`write` and `group` of `server.store.database.Database`, for a connection that says how a transaction begins."""

    _writing = _grouped = _begun = False
    # The savepoint of the last write is still there.
    _marked = False
    _lost: BaseException | None = None
    # Whose data alone the group depends on; None: anything.
    _users: Collection[str] | None = None

    @abstractmethod
    def _in_transaction(self) -> bool:
        """Whether a transaction is open on the connection."""

    @abstractmethod
    def _begin(self) -> None:
        """Begin a transaction that holds the write lock."""

    @abstractmethod
    def _rollback(self) -> None:
        """End the transaction, if one is open, without its writes. Never raises."""

    @abstractmethod
    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int: ...

    @abstractmethod
    def _mark(self, sql: str) -> None:
        """Run statements that set a savepoint. The commit releases the last one."""

    @contextmanager
    def write(self) -> Iterator[None]:
        """One transaction that holds the write lock from its first statement; nested calls join the outer one."""
        if self._writing:
            yield
        elif self._grouped:
            with self._savepoint():
                yield
        else:
            with self.group(), self._savepoint():
                yield

    @contextmanager
    def group(self, users: Collection[str] | None = None) -> Iterator[None]:
        """Each `write` inside is still atomic, but all become durable by one commit at the end.

        Raises if that commit fails, or the transaction was lost before; then none of them was stored.
        """
        self._grouped, self._users, self._lost = True, users, None
        self._begun = self._marked = False
        try:
            yield
            self._check_whole()
            if self._begun:
                failpoint("commit")
                self._commit()
                failpoint("committed")
        finally:
            self._rollback()
            self._grouped, self._users = False, None

    def _commit(self) -> None:
        self.execute("COMMIT")

    def _check_whole(self) -> None:
        """Raise if the group's transaction is gone, with its writes: after a full disk, or a lost connection."""
        if self._lost is None and self._begun and not self._in_transaction():
            self._lost = DatabaseError("The transaction was lost; nothing was stored.")
        if self._lost:
            raise self._lost

    @contextmanager
    def _fatal(self) -> Iterator[None]:
        """An error in the block fails the whole group."""
        try:
            yield
        except BaseException as error:
            self._lost = error
            raise

    @contextmanager
    def _savepoint(self) -> Iterator[None]:
        self._check_whole()
        with self._fatal():
            if not self._begun:
                self._begin()
                self._begun = True
            self._mark("RELEASE one; SAVEPOINT one" if self._marked else "SAVEPOINT one")
            self._marked = True
        self._writing = True
        try:
            yield
        except BaseException as error:
            if not self._in_transaction():
                self._lost = error
                raise
            with self._fatal():
                self.execute("ROLLBACK TO one")
            raise
        finally:
            self._writing = False

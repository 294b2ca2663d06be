"""Groups of writes with one commit, on any database: each write is a savepoint of the group's transaction."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from server.shared.failpoints import failpoint


class Transactions(ABC):
    """`write` and `group` of `server.store.database.Database`, for a connection that says how a transaction begins."""

    _writing = _grouped = False
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

        Raises if that commit fails; then none of them was stored.
        """
        self._grouped, self._users, self._lost = True, users, None
        try:
            yield
            if self._lost:
                raise self._lost
            if self._in_transaction():
                failpoint("commit")
                self._commit()
                failpoint("committed")
        except BaseException:
            self._rollback()
            raise
        finally:
            self._grouped, self._users = False, None

    def _commit(self) -> None:
        self.execute("COMMIT")

    @contextmanager
    def _savepoint(self) -> Iterator[None]:
        if self._lost:
            raise self._lost
        if not self._in_transaction():
            self._begin()
        self.execute("SAVEPOINT one")
        self._writing = True
        try:
            yield
        except BaseException as error:
            if self._in_transaction():
                self.execute("ROLLBACK TO one")
                self.execute("RELEASE one")
            else:
                # For example a full disk, or a lost connection: the whole transaction is gone, with earlier writes.
                self._lost = error
            raise
        finally:
            self._writing = False
        self.execute("RELEASE one")

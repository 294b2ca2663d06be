"""Requests with a request_id, and the first result of each."""

from server.shared.errors import ConflictError, FailedPreconditionError, InvalidArgumentError
from server.store.chats.records import RepeatedRequest
from server.store.database import Database


class Requests:
    """Reads and writes of the results by `request_id`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def find(self, user: str, rpc: str, request_id: str, body_sha256: bytes) -> bytes | None:
        """The first result of the same request; None if it is new. Raises InvalidArgumentError for the same id with
        another body, and FailedPreconditionError if the first result was deleted. An empty id is always new."""
        if not request_id:
            return None
        row = self._db.row(
            "SELECT body_sha256, result FROM requests WHERE user = ? AND rpc = ? AND request_id = ?",
            [user, rpc, request_id],
        )
        if row is None:
            return None
        if not row["body_sha256"]:
            raise FailedPreconditionError("REQUEST_DELETED", "The result of this request was deleted.")
        if row["body_sha256"] != body_sha256:
            raise InvalidArgumentError(
                "request_id", "This request_id was used with another body; use a new one.", "REQUEST_ID_REUSED"
            )
        return bytes(row["result"])

    def remember(
        self, user: str, rpc: str, request_id: str, body_sha256: bytes, result: bytes, target: str | None = None
    ) -> None:
        """Store the result, which is about the response or comparison `target`, for `find`. Call it in the transaction
        that executes the request. Does nothing for an empty id. Raises ConflictError for a request that is not new."""
        if not request_id:
            return
        new = self._db.execute(
            "INSERT INTO requests (user, rpc, request_id, body_sha256, result, target, create_time) "
            f"VALUES (?, ?, ?, ?, ?, ?, {self._db.NOW}) ON CONFLICT DO NOTHING",
            [user, rpc, request_id, body_sha256, result, target],
        )
        if not new:
            raise ConflictError(f"{rpc} with this request_id was called before.")

    def page(self, user: str, limit: int, after: tuple[str, str] = ("", "")) -> list[RepeatedRequest]:
        """The user's stored request_ids, by RPC and id; at most `limit` after `after`."""
        rows = self._db.rows(
            "SELECT rpc, request_id, create_time FROM requests WHERE user = ? AND (rpc, request_id) > (?, ?) "
            "ORDER BY rpc, request_id LIMIT ?",
            [user, *after, limit],
        )
        return [RepeatedRequest(**row) for row in rows]

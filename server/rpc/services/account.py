"""AccountService: export and deletion of a user's data. A deletion runs to its end even if the caller disconnects."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from prefloop.v1 import account_pb2, account_pb2_grpc

from server.admin.retention_task import RetentionTask
from server.rpc.access import Access
from server.rpc.export import export
from server.rpc.identity import current_caller
from server.rpc.open_calls import OpenCalls
from server.shared.errors import PermissionDeniedError
from server.store.keys import sha256
from server.store.store_thread import StoreThread


class AccountService(account_pb2_grpc.AccountServiceServicer):
    """Users act on their own data, operators on anybody's."""

    def __init__(
        self, store: StoreThread, access: Access, calls: OpenCalls, retention: RetentionTask, poll_seconds: float
    ) -> None:
        self._store = store
        self._access = access
        self._calls = calls
        self._retention = retention
        self._poll_seconds = poll_seconds
        # The newest entry about a deleted user that was seen, and those made here since.
        self._seen, self._own = 0, set[int]()
        # Users who were deleted elsewhere, and may have left something here since.
        self._owed: set[str] = set()
        self._forgetting: set[asyncio.Task[account_pb2.ForgetUserResponse]] = set()
        # Open ForgetUser calls by user, so that two at the same time do not end each other.
        self._asking: dict[str, set[asyncio.Task[object]]] = defaultdict(set)

    async def GetCaller(self, request: account_pb2.GetCallerRequest, context: Any) -> account_pb2.GetCallerResponse:
        caller = current_caller()
        return account_pb2.GetCallerResponse(user=caller.user, role=caller.role, has_key=caller.has_key)

    async def ForgetUser(self, request: account_pb2.ForgetUserRequest, context: Any) -> account_pb2.ForgetUserResponse:
        # A separate task: users who delete themselves have no key left to try again with.
        user, asking = _whose(request.user), asyncio.current_task()
        assert asking is not None
        self._asking[user].add(asking)
        try:
            task = asyncio.create_task(self._forget(user))
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)
            return await asyncio.shield(task)
        finally:
            self._asking[user].discard(asking)
            if not self._asking[user]:
                del self._asking[user]

    async def ExportUser(self, request: account_pb2.ExportUserRequest, context: Any) -> None:  # type: ignore[override]
        user = _whose(request.user)
        parts = await self._store.read(lambda store: export(store, user))
        # One part at a time, so that others can use the store in between.
        next_part: Callable[[Any], account_pb2.ExportUserResponse | None] = lambda store: next(parts, None)  # noqa: E731
        while part := await self._store.read(next_part):
            await context.write(part)

    async def end_forgotten(self) -> None:
        """End the calls of users who were deleted at another server, and delete what they have stored since. Call it
        every `poll_seconds`: so long a key is still accepted here, and what came in that time is deleted, too."""
        entries = await self._store.read(lambda store: store.keys.forgotten(self._seen))
        now, users = time.monotonic(), self._calls.seen()
        began_before = {
            entry.user_sha256: now - entry.age + self._poll_seconds for entry in entries if entry.seq not in self._own
        }
        self._seen = max((entry.seq for entry in entries), default=self._seen)
        self._own = {seq for seq in self._own if seq > self._seen}
        gone = {user: began_before[digest] for user in users if (digest := sha256(user)) in began_before}
        self._owed |= set(gone)
        but = self._asking
        await asyncio.gather(*(self._calls.end(user, but.get(user, set()), before) for user, before in gone.items()))
        await self._delete_owed()

    async def drain(self) -> None:
        """Return once all deletions that have begun are complete."""
        while self._forgetting:
            await asyncio.wait(self._forgetting)
        await self._delete_owed()

    async def _forget(self, user: str) -> account_pb2.ForgetUserResponse:
        # Refuse new calls, end the open ones, and only then delete rows: the store runs its work in order.
        self._own.add(await self._store(lambda store: store.keys.forget(user)))
        await self._access.refresh()
        await self._calls.end(user, but=self._asking.get(user, set()))
        kept = await self._store(lambda store: store.deletion.look(user))
        await self._delete(user)
        return account_pb2.ForgetUserResponse(
            conversations=kept.conversations,
            votes=kept.votes,
            policy_versions=kept.policy_versions,
            reward_model_versions=kept.reward_model_versions,
            running_round_ids=kept.running_round_ids,
            erased=await self._retention.erase(),
        )

    async def _delete_owed(self) -> None:
        for user in list(self._owed):
            await self._delete(user)
            self._owed.discard(user)

    async def _delete(self, user: str) -> None:
        while await self._store(lambda store: store.deletion.step(user)):
            pass


def _whose(named: str) -> str:
    """The user that a request is about. Raises PermissionDeniedError."""
    caller = current_caller()
    if named and named != caller.user and caller.role != "operator":
        raise PermissionDeniedError("Only an operator may name another user.")
    return named or caller.user

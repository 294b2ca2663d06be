"""PolicyService: what serves, what was learned, and the pointer that an operator moves."""

from typing import Any

from prefloop.v1 import policy_pb2, policy_pb2_grpc

from server import convert
from server.follower import Follower
from server.identity import current_user
from server.records import PointerAction, Policy
from server.store import FeedbackStore
from server.store_thread import StoreThread


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """For operators."""

    def __init__(self, store: StoreThread, follower: Follower) -> None:
        self._store = store
        self._follower = follower

    async def GetActivePolicy(
        self, request: policy_pb2.GetActivePolicyRequest, context: Any
    ) -> policy_pb2.GetActivePolicyResponse:
        def read(store: FeedbackStore) -> policy_pb2.GetActivePolicyResponse:
            return policy_pb2.GetActivePolicyResponse(
                policy=convert.policy(store.registry.active_policy()),
                replicas=[convert.replica(record) for record in store.registry.replicas()],
            )

        return await self._store(read)

    async def ListPolicies(
        self, request: policy_pb2.ListPoliciesRequest, context: Any
    ) -> policy_pb2.ListPoliciesResponse:
        size = request.page_size or convert.DEFAULT_PAGE_SIZE
        key = convert.page_key(request.page_token, (str,))
        found = await self._store(lambda store: store.registry.policies(size + 1, key[0] if key else None))
        page = found[:size]
        more = convert.page_token([page[-1].version]) if len(found) > size else ""
        return policy_pb2.ListPoliciesResponse(
            policies=[convert.policy(record) for record in page], next_page_token=more
        )

    async def ActivatePolicy(
        self, request: policy_pb2.ActivatePolicyRequest, context: Any
    ) -> policy_pb2.ActivatePolicyResponse:
        expected = request.expected_active_version if request.HasField("expected_active_version") else None
        policy = await self._activate(request.version, current_user(), "activated by RPC", expected)
        return policy_pb2.ActivatePolicyResponse(policy=convert.policy(policy))

    async def RollbackPolicy(
        self, request: policy_pb2.RollbackPolicyRequest, context: Any
    ) -> policy_pb2.RollbackPolicyResponse:
        active, target = await self._store(lambda store: store.registry.rollback_step(request.version))
        # Compare-and-set: two operators who press the button at once go back one step, not two.
        policy = await self._activate(target, current_user(), f"rolled back from {active}", active, "rollback")
        return policy_pb2.RollbackPolicyResponse(policy=convert.policy(policy))

    async def ListRounds(self, request: policy_pb2.ListRoundsRequest, context: Any) -> policy_pb2.ListRoundsResponse:
        size = request.page_size or convert.DEFAULT_PAGE_SIZE
        key = convert.page_key(request.page_token, (str,))
        found = await self._store(lambda store: store.registry.rounds(size + 1, key[0] if key else None))
        page = found[:size]
        more = convert.page_token([page[-1].id]) if len(found) > size else ""
        return policy_pb2.ListRoundsResponse(rounds=[convert.round_(record) for record in page], next_page_token=more)

    async def _activate(
        self, version: str, actor: str, reason: str, expected: str | None, action: PointerAction = "activate"
    ) -> Policy:
        # Unknown versions first: NOT_FOUND says more than a directory that cannot be loaded.
        await self._store(lambda store: store.registry.policy(version))
        await self._follower.activate(
            version,
            lambda store: store.registry.activate_policy(
                version, actor=actor, action=action, reason=reason, expected_active_version=expected
            ),
        )
        return await self._store(lambda store: store.registry.policy(version))

"""PolicyService: versions, rounds, the learner, and the pointer to the active version."""

import asyncio
from pathlib import Path
from typing import Any

from prefloop.v1 import policy_pb2, policy_pb2_grpc

from server.rpc import to_proto
from server.rpc.identity import current_user
from server.rpc.paging import CHUNK, fill, in_chunks
from server.store.files.residue import keeping
from server.store.files.round_samples import RoundSample, read_samples
from server.store.learning.records import Learner, PointerAction, PolicyVersion, Round
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.versions.ab_test import AbTest
from server.versions.follower import Follower

DEFAULT_DAYS = 30


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """RPCs for operators."""

    def __init__(self, store: StoreThread, follower: Follower, data_dir: Path, ab_test: AbTest | None) -> None:
        self._store = store
        self._follower = follower
        self._data_dir = data_dir
        self._ab_test = ab_test

    async def GetActivePolicy(
        self, request: policy_pb2.GetActivePolicyRequest, context: Any
    ) -> policy_pb2.GetActivePolicyResponse:
        def read(store: Store) -> policy_pb2.GetActivePolicyResponse:
            duel = self._ab_test.duel(store) if self._ab_test else None
            canary = store.canaries.waiting()
            return policy_pb2.GetActivePolicyResponse(
                policy=to_proto.policy(store.policies.active()),
                replicas=[to_proto.replica(record) for record in store.replicas.alive()],
                rollback_version=store.policies.previous_version() or "",
                duel=to_proto.duel(duel) if duel else None,
                canary=to_proto.canary(canary, store.canaries.result(canary)) if canary else None,
            )

        return await self._store(read)

    async def ListPolicies(
        self, request: policy_pb2.ListPoliciesRequest, context: Any
    ) -> policy_pb2.ListPoliciesResponse:
        size = request.page_size or to_proto.DEFAULT_PAGE_SIZE
        key = to_proto.page_key(request.page_token, (str,))

        def read(store: Store) -> policy_pb2.ListPoliciesResponse:
            def follow(last: PolicyVersion | None) -> list[PolicyVersion]:
                return store.policies.page(CHUNK, last.version if last else key[0] if key else None)

            page, more = fill((([record.version], to_proto.policy(record)) for record in in_chunks(follow)), size)
            return policy_pb2.ListPoliciesResponse(policies=page, next_page_token=more)

        return await self._store.read(read)

    async def ActivatePolicy(
        self, request: policy_pb2.ActivatePolicyRequest, context: Any
    ) -> policy_pb2.ActivatePolicyResponse:
        reason = request.reason.strip() or "activated by RPC"
        policy = await self._activate(request.version, current_user(), reason, _expected(request))
        return policy_pb2.ActivatePolicyResponse(policy=to_proto.policy(policy))

    async def RollbackPolicy(
        self, request: policy_pb2.RollbackPolicyRequest, context: Any
    ) -> policy_pb2.RollbackPolicyResponse:
        expected = _expected(request)
        active, target = await self._store(lambda store: store.policies.rollback_step(request.version, expected))
        reason = request.reason.strip() or f"rolled back from {active}"
        # Always compare-and-set: two operators who roll back at the same time go back one step, not two.
        policy = await self._activate(target, current_user(), reason, active, "rollback")
        return policy_pb2.RollbackPolicyResponse(policy=to_proto.policy(policy))

    async def ListRounds(self, request: policy_pb2.ListRoundsRequest, context: Any) -> policy_pb2.ListRoundsResponse:
        size = request.page_size or to_proto.DEFAULT_PAGE_SIZE
        key = to_proto.page_key(request.page_token, (str,))

        def read(store: Store) -> policy_pb2.ListRoundsResponse:
            def follow(last: Round | None) -> list[Round]:
                return store.rounds.page(CHUNK, last.id if last else key[0] if key else None)

            page, more = fill((([record.id], to_proto.round_(record)) for record in in_chunks(follow)), size)
            return policy_pb2.ListRoundsResponse(rounds=page, next_page_token=more)

        return await self._store.read(read)

    async def ListRoundSamples(
        self, request: policy_pb2.ListRoundSamplesRequest, context: Any
    ) -> policy_pb2.ListRoundSamplesResponse:
        size = request.page_size or to_proto.DEFAULT_PAGE_SIZE
        key = to_proto.page_key(request.page_token, (int,))
        # Use the id from the store, which is a plain name, never the one from the request.
        round_ = await self._store(lambda store: store.rounds.get(request.round_id))
        found = await asyncio.to_thread(self._samples, round_, key[0] if key else -1)
        # Checked last: conversations deleted before this answer are not in it, swept or not.
        there = await self._store(lambda store: store.conversations.existing(one.conversation_id for one in found))
        kept = (one for one in found if not one.conversation_id or one.conversation_id in there)
        page, more = fill((([sample.row], to_proto.sample(sample)) for sample in kept), size)
        return policy_pb2.ListRoundSamplesResponse(samples=page, next_page_token=more)

    async def CountVotes(self, request: policy_pb2.CountVotesRequest, context: Any) -> policy_pb2.CountVotesResponse:
        days = request.days or DEFAULT_DAYS
        counts = await self._store.read(lambda store: store.feedback.count_by_day(days))
        return policy_pb2.CountVotesResponse(counts=[to_proto.vote_count(count) for count in counts])

    async def GetLearner(self, request: policy_pb2.GetLearnerRequest, context: Any) -> policy_pb2.GetLearnerResponse:
        return policy_pb2.GetLearnerResponse(learner=to_proto.learner(await self._learner()))

    async def RequestRound(
        self, request: policy_pb2.RequestRoundRequest, context: Any
    ) -> policy_pb2.RequestRoundResponse:
        await self._store(lambda store: store.round_requests.ask())
        return policy_pb2.RequestRoundResponse(learner=to_proto.learner(await self._learner()))

    async def _learner(self) -> Learner:
        # It counts votes, which takes a while if there are many.
        return await self._store.read(lambda store: store.learner())

    def _samples(self, round_: Round, after: int) -> list[RoundSample]:
        """Samples after a row. No sweep and no round writes in the meantime, so no line is incomplete."""
        with keeping(self._data_dir):
            return [sample for sample in read_samples(self._data_dir, round_) if sample.row > after]

    async def _activate(
        self, version: str, actor: str, reason: str, expected: str | None, action: PointerAction = "activate"
    ) -> PolicyVersion:
        # Check for unknown versions first: NOT_FOUND says more than a directory that cannot be loaded.
        await self._store(lambda store: store.policies.get(version))
        await self._follower.activate(
            version,
            lambda store: store.policies.activate(
                version, actor=actor, action=action, reason=reason, expected_active_version=expected
            ),
        )
        return await self._store(lambda store: store.policies.get(version))


def _expected(request: policy_pb2.ActivatePolicyRequest | policy_pb2.RollbackPolicyRequest) -> str | None:
    return request.expected_active_version if request.HasField("expected_active_version") else None

"""All stored data of a user, as messages. Token ids that the model read are left out: they hold the same text."""

from collections.abc import Iterator

from prefloop.v1 import account_pb2

from server.rpc import to_proto
from server.rpc.paging import CHUNK, in_chunks
from server.shared.errors import NotFoundError
from server.store.chats.records import Conversation
from server.store.store import Store

# Turns of a conversation per message: gRPC clients accept 4 MB.
PART_TURNS = 10


def export(store: Store, user: str) -> Iterator[account_pb2.ExportUserResponse]:
    """Yield one part after another, each read on demand."""
    for record in store.conversations.page(user, kinds=("chat", "review")):
        yield from _conversation(store, record)
    pairs = store.feedback.of_pairs(user)
    for vote in in_chunks(lambda last: store.feedback.page(user, CHUNK, last.event_seq if last else None)):
        if vote.id in pairs and vote.comparison_id:
            pair = store.responses.comparison(user, vote.comparison_id)
            yield account_pb2.ExportUserResponse(pair=to_proto.comparison(pair, [vote]))
        elif not (vote.response_id or vote.comparison_id):
            yield account_pb2.ExportUserResponse(feedback=to_proto.feedback(vote))
    for vote in in_chunks(lambda last: store.lineage.past_feedback(user, CHUNK, last.event_seq if last else 0)):
        yield account_pb2.ExportUserResponse(past_feedback=to_proto.feedback(vote))
    for key in store.keys.all():
        if key.user == user:
            yield account_pb2.ExportUserResponse(key=to_proto.key(key))
    for request in in_chunks(
        lambda last: store.requests.page(user, CHUNK, (last.rpc, last.request_id) if last else ("", ""))
    ):
        yield account_pb2.ExportUserResponse(repeated_request=to_proto.repeated_request(request))
    for said in in_chunks(lambda last: store.machine_choices.page(user, CHUNK, last.seq if last else 0)):
        yield account_pb2.ExportUserResponse(machine_choice=to_proto.machine_choice(said))
    for word in store.quarantine.events(user):
        yield account_pb2.ExportUserResponse(quarantine=to_proto.quarantine(word))
    for move in store.lineage.moves():
        if move.actor == user:
            yield account_pb2.ExportUserResponse(policy_move=to_proto.policy_move(move))


def _conversation(store: Store, record: Conversation) -> Iterator[account_pb2.ExportUserResponse]:
    after = 0
    while True:
        try:
            turns = store.conversations.turns(record.user, record.id, PART_TURNS, after)
        except NotFoundError:
            return  # Deleted since.
        if turns or not after:
            part = to_proto.conversation(record, turns, store.feedback.on_turns(record.user, turns))
            yield account_pb2.ExportUserResponse(conversation=part)
        if not turns:
            return
        after = turns[-1].seq

"""Deletes conversations that no server is writing to."""

import asyncio

from server.store.store import Store
from server.store.store_thread import StoreThread

# Between two looks at what another server does.
ELSEWHERE_SECONDS = 0.1


async def delete_conversation(store: StoreThread, replica_id: str, user: str, conversation_id: str) -> None:
    """Delete a conversation once no server other than `replica_id` writes an answer there. Raises NotFoundError."""

    def delete(store: Store) -> bool:
        with store.transaction():
            store.conversations.get(user, conversation_id)
            if store.responses.elsewhere(replica_id, conversation_id):
                return False
            store.conversations.delete(user, conversation_id)
            return True

    while not await store(delete):
        await asyncio.sleep(ELSEWHERE_SECONDS)

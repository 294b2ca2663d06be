"""Storage limits per user, checked in the transaction that adds to the store."""

from server.shared.errors import ResourceExhaustedError
from server.store.store import Store


def check_conversations(store: Store, user: str, most: int) -> None:
    """Raise ResourceExhaustedError if one more would exceed `most`."""
    if store.conversations.count(user) >= most:
        sentence = f"You have {most} conversations; delete one before you start another."
        raise ResourceExhaustedError("USER_CONVERSATIONS", sentence)


def check_demonstrations(store: Store, user: str, most: int) -> None:
    """Raise ResourceExhaustedError if one more would exceed `most`."""
    if store.feedback.count_demonstrations(user) >= most:
        sentence = f"You have {most} demonstrations, including retracted ones, which is the limit."
        raise ResourceExhaustedError("USER_DEMONSTRATIONS", sentence)

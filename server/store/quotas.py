"""How much of one user is kept. Checked in the transaction that adds to it."""

from server.shared.errors import ResourceExhaustedError
from server.store.store import Store


def check_conversations(store: Store, user: str, most: int) -> None:
    """Raises ResourceExhaustedError where one more would be more than `most`."""
    if store.conversations.count(user) >= most:
        sentence = f"You have {most} conversations; delete one before you begin another."
        raise ResourceExhaustedError("USER_CONVERSATIONS", sentence)


def check_demonstrations(store: Store, user: str, most: int) -> None:
    """Raises ResourceExhaustedError where one more would be more than `most`."""
    if store.feedback.count_demonstrations(user) >= most:
        sentence = f"{most} demonstrations of yours are kept, those that you retracted too; no more are taken."
        raise ResourceExhaustedError("USER_DEMONSTRATIONS", sentence)

"""Whether a round is to learn from demonstrations by itself. Reads only the store: no torch."""

from server.store.store import Store


def due(store: Store, min_new: int) -> bool:
    """Whether `min_new` demonstrations and corrections are new, or a round that learns from such was stopped. Of one
    user at most half of them count: what one person shows becomes the reference only by `learner sft`."""
    if stopped := store.rounds.running():
        return stopped.kind == "sft"
    if not min_new or not store.policies.reference():
        return False
    of_users = store.snapshots.count_examples(after_last(store)).values()
    return sum(min(count, -(-min_new // 2)) for count in of_users) >= min_new


def after_last(store: Store) -> int:
    """The newest event that a round of the active version's model saw that learned from demonstrations, or tried to."""
    last = store.rounds.last_fine_tuned()
    return last.watermark if last else 0

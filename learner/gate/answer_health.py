"""Properties of answers that do not depend on a judge."""

from learner.model.rollout import SampledAnswer
from server.store.learning.round_metrics import AnswerHealth


def health(samples: list[SampledAnswer]) -> AnswerHealth:
    """Means over the samples."""
    n = len(samples)
    return AnswerHealth(
        length=sum(len(s.token_ids) for s in samples) / n,
        empty=sum(not s.text.strip() for s in samples) / n,
        ended=sum(s.ended for s in samples) / n,
        repetition=sum(repetition(s.token_ids) for s in samples) / n,
    )


def repetition(token_ids: list[int], n: int = 4) -> float:
    """The share of n-grams that occurred before in the same answer."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

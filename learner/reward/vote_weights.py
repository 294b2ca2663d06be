"""How much a vote counts by its age and by how many votes its user has. Pure torch."""

import torch
from torch import Tensor


def vote_weights(ages_days: Tensor, users: Tensor, half_life_days: float, floor: float, user_share: float) -> Tensor:
    """(V,) weight of each vote: halved every `half_life_days`, never below `floor`. Then no user (U integers) has more
    than `user_share` of the sum, or twice an equal share if that is more."""
    weights = torch.clamp(0.5 ** (ages_days / half_life_days), min=floor)
    if not len(weights):
        return weights
    totals = torch.zeros(int(users.max()) + 1, dtype=weights.dtype).scatter_add_(0, users, weights)
    return weights * cap_shares(totals, user_share)[users]


def cap_shares(totals: Tensor, user_share: float) -> Tensor:
    """Factors <= 1 after which no user's total exceeds `user_share` of the sum, or two equal shares if that is more:
    the highest cap that satisfies itself. One or two users are not capped."""
    share = max(user_share, 2 / max(int((totals > 0).sum()), 1))
    if share >= 1:
        return torch.ones_like(totals)
    low, high = 0.0, float(totals.max())
    for _ in range(60):
        cap = (low + high) / 2
        capped = totals.clamp(max=cap)
        low, high = (cap, high) if cap <= share * float(capped.sum()) else (low, cap)
    return totals.clamp(max=low) / totals.clamp(min=1e-12)

"""How far a round may take the policy from its reference."""

import math
from dataclasses import dataclass

from learner.improve_settings import PolicySettings


@dataclass(frozen=True)
class Budget:
    """Bounds on the KL to the reference in nats: `kl` of a whole answer, and `per_token` of it. `moved` of `kl` is
    beyond a first round's."""

    kl: float
    moved: float = 0.0
    per_token: float = math.inf

    @classmethod
    def after(cls, incumbent_kl: float, settings: PolicySettings) -> "Budget":
        """The budget of a round whose incumbent has this KL to the reference. With the budget of the first round, more
        votes would change the policy by less than people can tell apart (docs/decisions/0044)."""
        moved = max(0.0, min(incumbent_kl, settings.kl_total - settings.kl_budget))
        return cls(settings.kl_budget + moved, moved, settings.kl_per_token)

    def share(self, length: float) -> float:
        """How much of `kl` answers of this mean length may use."""
        return self.of(length) / self.kl

    def of(self, length: float) -> float:
        """The bound on the sequence KL of answers of this mean length, in tokens."""
        return min(self.kl, self.per_token * length)

"""What imported preferences say, as a direction in the features that a fit on people's own votes may follow.

Other people's preferences, on other models' answers, may be about the same things as the votes here, or not. So a head
is fitted on them, in the features as scaled for the votes, and its score becomes one more feature of the fit on the
votes. How much that feature may say is chosen by cross-validation on the votes, where nothing of the import is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.reward import linear_heads as fitting
from learner.reward.evaluation import cross_validate, fold_of
from learner.reward.likelihood import A
from learner.reward.linear_heads import VoteTensors
from learner.reward.standardiser import Standardiser
from learner.settings import RewardSettings

# Standard deviations of the import's score as a feature; log length has 1, and all layers together.
WEIGHTS = (1.0, 3.0)


@dataclass(frozen=True)
class ImportedPreferences:
    """Features (2 * M, F) of the answers of M preferences, the chosen one of each first."""

    features: Tensor

    def __len__(self) -> int:
        return len(self.features) // 2

    @property
    def votes(self) -> VoteTensors:
        """Each preference as a choice, in a conversation of its own."""
        numbers, none = torch.arange(len(self)), torch.zeros(0, dtype=torch.long)
        return VoteTensors(
            a=2 * numbers, b=2 * numbers + 1, outcome=torch.full_like(numbers, A),
            temperature_difference=torch.zeros(len(self)), choice_weight=torch.ones(len(self)), choice_group=numbers,
            response=none, thumb=torch.zeros(0), user=none, thumb_weight=torch.zeros(0), thumb_group=none, users=1,
        )  # fmt: skip


def direction(
    imported: ImportedPreferences, scaling: Standardiser, settings: RewardSettings, generator: torch.Generator
) -> Tensor:
    """(F,) weights of a head fitted on the import, on features as `scaling` standardises them."""
    standard, votes = scaling(imported.features), imported.votes
    basis = fitting.span_basis(standard)
    reduced, grid = standard @ basis, torch.tensor(settings.l2_grid)
    folds = fold_of(votes, min(settings.folds, votes.groups), generator)
    nll = cross_validate(reduced, votes, grid, settings.label_smoothing, folds).nll
    return basis @ fitting.fit(reduced, votes, grid[nll.argmin()][None], settings.label_smoothing).weights[0]


@dataclass(frozen=True)
class Prior:
    """A direction (F,), scaled so that its score has standard deviation `weight` on the voted answers."""

    direction: Tensor
    weight: float

    @classmethod
    def of(cls, direction: Tensor, standard: Tensor, weight: float) -> "Prior":
        """For voted answers with standardised features (N, F)."""
        sd = float((standard @ direction).std(correction=0))
        return cls(direction * (weight / sd if sd > 0 else 0.0), weight)

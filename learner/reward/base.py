"""The interface of a reward model, as a round needs it."""

from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from learner.model.features import FeatureSpec
from learner.reward.linear_heads import VoteTensors
from learner.reward.standardiser import Standardiser
from learner.settings import RewardSettings


class RewardModel(Protocol):
    """Scores answers from frozen features of the reference (`learner.model.features`), in standard deviations of the
    reference's own answers."""

    @property
    def spec(self) -> FeatureSpec:
        """What its features are made of."""
        ...

    @property
    def standardiser(self) -> Standardiser:
        """Scales features to comparable size."""
        ...

    @property
    def l2(self) -> float:
        """The L2 penalty chosen on the votes; the judge is fitted with it, too."""
        ...

    @classmethod
    def fit(
        cls,
        features: Tensor,
        votes: VoteTensors,
        spec: FeatureSpec,
        settings: RewardSettings,
        generator: torch.Generator,
    ) -> Self:
        """Fits votes on answers with features (N, F); its scores have no unit yet."""
        ...

    def standardised(self, reference_features: Tensor, prompt_states: Tensor) -> Self:
        """The same model with scores of mean 0 and sd 1 over the reference's answers, features (N, F), to prompts whose
        last tokens have states (N, F - 1)."""
        ...

    def prompt_features(self, states: Tensor) -> Tensor:
        """(..., F - 1) the standardised features expected of an answer, from its prompt's last states (..., F - 1)."""
        ...

    def scores(self, features: Tensor) -> Tensor:
        """(N,) scores of features (N, F)."""
        ...

    def uncertainty(self, features: Tensor) -> float:
        """How uncertain the mean score of these answers, features (N, F), is: a standard deviation."""
        ...

    def clipped(self, scores: Tensor) -> Tensor:
        """Scores clipped to the range that votes covered."""
        ...

    def linear_head(self) -> tuple[Tensor, float]:
        """(F,) weights and a bias on standardised features, from which a critic starts."""
        ...

    def save(self, directory: Path) -> None:
        """Writes everything into an existing directory."""
        ...

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Reads what `save` wrote."""
        ...

"""The reward model: one linear head on frozen reference features, standardised on reference answers.

Few votes cannot teach a network, but they can teach a head; so each round refits `weights` from nothing, on all
training votes, and the backbone stays the reference. The score of an answer is ((features - mean) * scale) @ weights
+ bias, mean 0 and sd 1 over reference answers; `low` and `high` bound the scores that voted answers reached, beyond
which nobody said anything. The thumb bars move along with every shift, so a thumb's probability stays what it was.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.reward import evaluation
from learner.reward import linear_heads as fitting
from learner.reward.linear_heads import Heads, VoteTensors
from learner.reward.standardiser import Standardiser, standardiser
from learner.settings import RewardSettings
from server.store.learning.round_metrics import HeldOut, SignalTest

# The share of voted answers below `low`, and above `high`: one odd answer must not open the range.
TAIL = 0.02
WEIGHTS, DESCRIPTION = "head.safetensors", "reward_model.json"


@dataclass(frozen=True)
class LinearRewardModel:
    """A fitted score; all tensors float32 on the CPU."""

    layers: tuple[int, ...]
    standardiser: Standardiser
    weights: Tensor  # (F,)
    # The same fit on other draws of the conversations; where they disagree the score is a guess.
    members: Tensor  # (K, F)
    member_bias: Tensor  # (K,)
    bias: float
    low: float
    high: float
    thumb_bar: float
    bad_bar: float
    eta: float
    # What one unit of temperature more did to a vote, on the score's scale; scores leave it out.
    temperature: float
    l2: float

    @classmethod
    def fit(
        cls,
        features: Tensor,
        votes: VoteTensors,
        layers: tuple[int, ...],
        settings: RewardSettings,
        generator: torch.Generator,
    ) -> "LinearRewardModel":
        """The score that `votes` ask for, on features (N, F) of the answers; its penalty chosen by cross-validation."""
        voted, votes = votes.voted(features)
        scaling = standardiser(voted, len(layers))
        standard = scaling(voted)
        basis = fitting.span_basis(standard)
        reduced = standard @ basis
        l2 = choose_l2(reduced, votes, settings, generator)
        head = fitting.fit(reduced, votes, torch.tensor([l2]), settings.label_smoothing)
        members = fitting.bootstrap(reduced, votes, l2, settings.label_smoothing, settings.members, generator)
        weights = basis @ head.weights[0]
        low, high = torch.quantile(standard @ weights, torch.tensor([TAIL, 1 - TAIL])).tolist()
        return cls(
            layers=layers,
            standardiser=scaling,
            weights=weights,
            members=members.weights @ basis.mT,
            member_bias=torch.zeros(settings.members),
            bias=0.0,
            low=low,
            high=high,
            thumb_bar=float(head.thumb_bar),
            bad_bar=float(head.bad_bar),
            eta=float(head.eta()),
            temperature=float(head.temperature),
            l2=l2,
        )

    def standardised(self, reference_features: Tensor) -> "LinearRewardModel":
        """The same model with scores of mean 0 and sd 1 over `reference_features` (N, F); everything on the
        score's scale moves along."""
        scores = self.scores(reference_features)
        mean, sd = float(scores.mean()), float(scores.std())
        if not sd > 0:
            raise ValueError("The reward model gives every reference answer the same score.")

        def moved(x: float) -> float:
            return (x - mean) / sd

        members = self.members / sd
        return replace(
            self,
            weights=self.weights / sd,
            members=members,
            # Each member's own zero: how far answers are above the reference's is what members may differ in.
            member_bias=-(members @ self.standardiser(reference_features).mT).mean(dim=1),
            bias=moved(self.bias),
            low=moved(self.low),
            high=moved(self.high),
            thumb_bar=moved(self.thumb_bar),
            bad_bar=moved(self.bad_bar),
            eta=self.eta / sd,
            temperature=self.temperature / sd,
        )

    def scores(self, features: Tensor) -> Tensor:
        """(N,) unclipped scores of features (N, F)."""
        return self.standardiser(features) @ self.weights + self.bias

    def member_scores(self, features: Tensor) -> Tensor:
        """(K, N) the members' scores of features (N, F), in the score's unit, zero on average on reference answers."""
        return self.members @ self.standardiser(features).mT + self.member_bias[:, None]

    def uncertainty(self, features: Tensor) -> float:
        """How far the mean score of these answers, features (N, F), is unsure: the members' standard deviation."""
        return float(self.member_scores(features).mean(dim=1).std())

    def clipped(self, scores: Tensor) -> Tensor:
        """Scores within the range that votes covered."""
        return scores.clamp(self.low, self.high)

    def linear_head(self) -> tuple[Tensor, float]:
        """(F,) weights and a bias on standardised features."""
        return self.weights, self.bias

    def save(self, directory: Path) -> None:
        save_file(
            {
                "mean": self.standardiser.mean.contiguous(),
                "scale": self.standardiser.scale.contiguous(),
                "weights": self.weights.contiguous(),
                "members": self.members.contiguous(),
                "member_bias": self.member_bias.contiguous(),
            },
            directory / WEIGHTS,
        )
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        (directory / DESCRIPTION).write_text(
            json.dumps({"layers": self.layers, **numbers}, indent=2) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, directory: Path) -> "LinearRewardModel":
        tensors = load_file(directory / WEIGHTS)
        numbers = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        layers = tuple(numbers.pop("layers"))
        return cls(
            layers,
            Standardiser(tensors["mean"], tensors["scale"]),
            tensors["weights"],
            tensors["members"],
            tensors["member_bias"],
            **numbers,
        )


def test_signal(
    features: Tensor, votes: VoteTensors, layers: tuple[int, ...], settings: RewardSettings, generator: torch.Generator
) -> SignalTest:
    """Whether `votes` say anything that features (N, F) of the answers can predict, before a model is fitted."""
    voted, votes = votes.voted(features)
    standard = standardiser(voted, len(layers))(voted)
    return evaluation.signal_test(
        standard @ fitting.span_basis(standard),
        votes,
        settings.signal_l2,
        settings.label_smoothing,
        min(settings.signal_folds, votes.groups),
        settings.signal_repeats,
        settings.permutations,
        generator,
    )


def choose_l2(features: Tensor, votes: VoteTensors, settings: RewardSettings, generator: torch.Generator) -> float:
    """The penalty of the lowest cross-validated NLL, averaged over several ways to make folds."""
    grid = torch.tensor(settings.l2_grid)
    folds = min(settings.folds, votes.groups)
    nll = torch.stack(
        [
            evaluation.cross_validate(
                features, votes, grid, settings.label_smoothing, evaluation.fold_of(votes, folds, generator)
            ).nll
            for _ in range(settings.fold_repeats)
        ]
    )
    return settings.l2_grid[int(nll.mean(dim=0).argmin())]


def evaluate(model: LinearRewardModel, features: Tensor, votes: VoteTensors) -> HeldOut:
    """How the model's unstandardised head does on votes it was not fitted on; the last feature is log length."""
    nothing = torch.zeros(1)
    as_head = Heads(model.weights[None], nothing, nothing, nothing, nothing, torch.zeros(1, votes.users))
    return evaluation.held_out(as_head, model.standardiser(features), votes, features[:, -1])

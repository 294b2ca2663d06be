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

from learner.reward import linear_heads as fitting
from learner.reward.linear_heads import Heads, HeldOut, SignalTest, VoteTensors
from learner.settings import RewardSettings

# Standard deviations of log length beyond which an answer is no longer or shorter.
MAX_LENGTH = 2.0
# The share of voted answers below `low`, and above `high`: one odd answer must not open the range.
TAIL = 0.02
WEIGHTS, DESCRIPTION = "head.safetensors", "reward_model.json"


@dataclass(frozen=True)
class Standardiser:
    """(F,) mean and scale that bring features to comparable size: each layer and the length have variance 1 in sum."""

    mean: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        standard = (features - self.mean) * self.scale
        # Where nearly every answer is cut at one length, a short one lies ten standard deviations out, and a linear
        # head would see nothing else.
        return torch.cat([standard[..., :-1], standard[..., -1:].clamp(-MAX_LENGTH, MAX_LENGTH)], dim=-1)


def standardiser(features: Tensor, layers: int) -> Standardiser:
    """From features (N, F) of answers: `layers` blocks of equal width, then the length as a block of its own.

    All layers together weigh as much as the length alone, which is the one feature that never needs many votes."""
    mean, sd = features.mean(dim=0), features.std(dim=0)
    scale = 1 / (sd + 1e-4 * sd.mean())
    scale[:-1] /= (len(scale) - 1) ** 0.5
    # A set of answers that all have one length says nothing about length.
    scale[-1] = 1 / sd[-1] if sd[-1] > 1e-3 else 0.0
    return Standardiser(mean, scale)


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

    def scores(self, features: Tensor) -> Tensor:
        """(N,) unclipped scores of features (N, F)."""
        return self.standardiser(features) @ self.weights + self.bias

    def member_scores(self, features: Tensor) -> Tensor:
        """(K, N) the members' scores of features (N, F), in the score's unit, zero on average on reference answers."""
        return self.members @ self.standardiser(features).mT + self.member_bias[:, None]

    def clipped(self, scores: Tensor) -> Tensor:
        """Scores within the range that votes covered."""
        return scores.clamp(self.low, self.high)

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


def fit_reward_model(
    features: Tensor, votes: VoteTensors, layers: tuple[int, ...], settings: RewardSettings, generator: torch.Generator
) -> LinearRewardModel:
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
    return LinearRewardModel(
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


def test_signal(
    features: Tensor, votes: VoteTensors, layers: tuple[int, ...], settings: RewardSettings, generator: torch.Generator
) -> SignalTest:
    """Whether `votes` say anything that features (N, F) of the answers can predict, before a model is fitted."""
    voted, votes = votes.voted(features)
    standard = standardiser(voted, len(layers))(voted)
    return fitting.signal_test(
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
            fitting.cross_validate(
                features, votes, grid, settings.label_smoothing, fitting.fold_of(votes, folds, generator)
            ).nll
            for _ in range(settings.fold_repeats)
        ]
    )
    return settings.l2_grid[int(nll.mean(dim=0).argmin())]


def standardise(model: LinearRewardModel, reference_features: Tensor) -> LinearRewardModel:
    """The same model with scores of mean 0 and sd 1 over `reference_features` (N, F); everything on the score's scale
    moves along."""
    scores = model.scores(reference_features)
    mean, sd = float(scores.mean()), float(scores.std())
    if not sd > 0:
        raise ValueError("The reward model gives every reference answer the same score.")

    def moved(x: float) -> float:
        return (x - mean) / sd

    members = model.members / sd
    return replace(
        model,
        weights=model.weights / sd,
        members=members,
        # Each member's own zero: how far answers are above the reference's is what members may differ in.
        member_bias=-(members @ model.standardiser(reference_features).mT).mean(dim=1),
        bias=moved(model.bias),
        low=moved(model.low),
        high=moved(model.high),
        thumb_bar=moved(model.thumb_bar),
        bad_bar=moved(model.bad_bar),
        eta=model.eta / sd,
        temperature=model.temperature / sd,
    )


def evaluate(model: LinearRewardModel, features: Tensor, votes: VoteTensors) -> HeldOut:
    """How the model's unstandardised head does on votes it was not fitted on; the last feature is log length."""
    nothing = torch.zeros(1)
    as_head = Heads(model.weights[None], nothing, nothing, nothing, nothing, torch.zeros(1, votes.users))
    return fitting.held_out(as_head, model.standardiser(features), votes, features[:, -1])

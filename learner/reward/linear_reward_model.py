"""The reward model: one linear head on frozen reference features, standardised on reference answers.

Few votes cannot train a network, but they can train a head. So each round refits `weights` from scratch on all training
votes, and the backbone stays the reference. The score of an answer is ((features - mean) * scale) @ weights + bias,
mean 0 and sd 1 over reference answers. `low` and `high` bound the scores of voted answers; beyond them there is no
evidence. The thumb bar shifts with the scores, so a thumb's probability stays the same.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.model.features import FeatureSpec
from learner.reward import evaluation
from learner.reward import linear_heads as fitting
from learner.reward.dataset import select, some_conversations
from learner.reward.linear_heads import Heads, VoteTensors
from learner.reward.prior import WEIGHTS as PRIOR_WEIGHTS
from learner.reward.prior import ImportedPreferences, Prior, direction
from learner.reward.standardiser import Standardiser, mixes, standardiser, states_scale
from learner.settings import RewardSettings
from server.store.learning.round_metrics import HeldOut

# The share of voted answers below `low`, and above `high`: one outlier must not widen the range.
TAIL = 0.02
# About so many votes choose how features are scaled, at most.
SCALING_VOTES = 500
# By how much the NLL of another scaling than the first must be lower to be chosen: folds of few votes differ so much.
BETTER = 0.015
WEIGHTS, DESCRIPTION = "head.safetensors", "reward_model.json"


@dataclass(frozen=True)
class LinearRewardModel:
    """A fitted score; all tensors float32 on the CPU."""

    spec: FeatureSpec
    standardiser: Standardiser
    weights: Tensor  # (F,)
    # Fits on other draws of the conversations; where they disagree, the score is uncertain.
    members: Tensor  # (K, F)
    member_bias: Tensor  # (K,)
    bias: float
    low: float
    high: float
    thumb_bar: float
    bad_bar: float
    eta: float
    # Effect of one unit of temperature on a vote, on the score's scale; scores exclude it.
    temperature: float
    l2: float
    # (F - 1,) from the states of a prompt's last token to the standardised features expected of its answer; zero before
    # `standardised`.
    prompt_mean: Tensor
    prompt_scale: Tensor
    # Standard deviations of what imported preferences say (`learner.reward.prior`); 0: nothing.
    prior_weight: float = 0.0

    @classmethod
    def fit(
        cls,
        features: Tensor,
        votes: VoteTensors,
        spec: FeatureSpec,
        settings: RewardSettings,
        generator: torch.Generator,
        imported: ImportedPreferences | None = None,
    ) -> "LinearRewardModel":
        """Fits the score to `votes` on features (N, F) of the answers. Its penalty, the mix of features and how much
        imported preferences say are chosen by cross-validation."""
        voted, votes = votes.voted(features)
        scalings = [standardiser(voted, spec, mix) for mix in mixes(spec)]
        scaling, l2 = choose(scalings, voted, votes, settings, generator)
        standard, prior = scaling(voted), None
        if imported:
            prior, l2 = choose_prior(imported, scaling, voted, votes, l2, settings, generator)
        basis = coordinates(standard, prior)
        reduced = standard @ basis
        head = fitting.fit(reduced, votes, torch.tensor([l2]), settings.label_smoothing)
        members = fitting.bootstrap(reduced, votes, l2, settings.label_smoothing, settings.members, generator)
        weights = basis @ head.weights[0]
        low, high = torch.quantile(standard @ weights, torch.tensor([TAIL, 1 - TAIL])).tolist()
        return cls(
            spec=spec,
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
            prior_weight=prior.weight if prior else 0.0,
            prompt_mean=torch.zeros(features.shape[1] - 1),
            prompt_scale=torch.zeros(features.shape[1] - 1),
        )

    def standardised(self, reference_features: Tensor, prompt_states: Tensor) -> "LinearRewardModel":
        """The same model with scores of mean 0 and sd 1 over `reference_features` (N, F); everything on the score's
        scale is converted. `prompt_states` (N, F - 1) are those of each answer's prompt at its last token."""
        scores = self.scores(reference_features)
        mean, sd = float(scores.mean()), float(scores.std())
        if not sd > 0:
            raise ValueError("The reward model gives every reference answer the same score.")

        def moved(x: float) -> float:
            return (x - mean) / sd

        weights, members = self.weights / sd, self.members / sd
        prompt_mean, prompt_scale = prompt_states.mean(dim=0), states_scale(prompt_states)
        expected = ((prompt_states - prompt_mean) * prompt_scale) @ weights[:-1]
        return replace(
            self,
            weights=weights,
            members=members,
            # Each member is centred on the reference's answers: members may differ in how far answers are above these.
            member_bias=-(members @ self.standardiser(reference_features).mT).mean(dim=1),
            bias=moved(self.bias),
            low=moved(self.low),
            high=moved(self.high),
            thumb_bar=moved(self.thumb_bar),
            bad_bar=moved(self.bad_bar),
            eta=self.eta / sd,
            temperature=self.temperature / sd,
            prompt_mean=prompt_mean,
            prompt_scale=prompt_scale * slope(expected, (scores - mean) / sd),
        )

    def prompt_features(self, states: Tensor) -> Tensor:
        """(..., F - 1) the standardised features expected of an answer, from the states (..., F - 1) of its prompt's
        last token: the head's score of those states, scaled to predict the scores of reference answers."""
        return (states - self.prompt_mean.to(states)) * self.prompt_scale.to(states)

    def scores(self, features: Tensor) -> Tensor:
        """(N,) unclipped scores of features (N, F)."""
        return self.standardiser(features) @ self.weights + self.bias

    def member_scores(self, features: Tensor) -> Tensor:
        """(K, N) the members' scores of features (N, F), in the score's unit, zero on average on reference answers."""
        return self.members @ self.standardiser(features).mT + self.member_bias[:, None]

    def uncertainty(self, features: Tensor) -> float:
        """How uncertain the mean score of these answers, features (N, F), is: the members' standard deviation."""
        return float(self.member_scores(features).mean(dim=1).std())

    def clipped(self, scores: Tensor) -> Tensor:
        """Scores clipped to the range that votes covered."""
        return scores.clamp(self.low, self.high)

    def linear_head(self) -> tuple[Tensor, float]:
        """(F,) weights and a bias on standardised features."""
        return self.weights, self.bias

    def save(self, directory: Path) -> None:
        save_file(
            {
                "surface": self.spec.surface.contiguous(),
                "mean": self.standardiser.mean.contiguous(),
                "scale": self.standardiser.scale.contiguous(),
                "weights": self.weights.contiguous(),
                "members": self.members.contiguous(),
                "member_bias": self.member_bias.contiguous(),
                "prompt_mean": self.prompt_mean.contiguous(),
                "prompt_scale": self.prompt_scale.contiguous(),
            },
            directory / WEIGHTS,
        )
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        (directory / DESCRIPTION).write_text(
            json.dumps({"words": self.spec.words, "meaning": self.spec.meaning, **numbers}, indent=2) + "\n",
            encoding="utf-8",
        )

    @classmethod
    def load(cls, directory: Path) -> "LinearRewardModel":
        tensors = load_file(directory / WEIGHTS)
        numbers = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        # A model of an earlier version expects the same of every prompt, and does not see the surface of tokens.
        nothing = torch.zeros(len(tensors["mean"]) - 1)
        surface = {"surface": tensors["surface"]} if "surface" in tensors else {}
        words, meaning = numbers.pop("words", ()), numbers.pop("meaning", None) or numbers.pop("layers")
        return cls(
            FeatureSpec(tuple(words), tuple(meaning), **surface),
            Standardiser(tensors["mean"], tensors["scale"]),
            tensors["weights"],
            tensors["members"],
            tensors["member_bias"],
            prompt_mean=tensors.get("prompt_mean", nothing),
            prompt_scale=tensors.get("prompt_scale", nothing),
            **numbers,
        )


def slope(predicted: Tensor, said: Tensor) -> float:
    """What multiplies `predicted` (N,) for the least squared error to `said` (N,); 0 if they do not rise together."""
    centred = predicted - predicted.mean()
    return max(0.0, float((centred * said).sum() / centred.square().sum().clamp(min=1e-12)))


def choose(
    scalings: list[Standardiser],
    features: Tensor,
    votes: VoteTensors,
    settings: RewardSettings,
    generator: torch.Generator,
) -> tuple[Standardiser, float]:
    """The scaling of features (N, F) and the penalty with the lowest cross-validated NLL, or the first scaling if none
    is clearly better; the first and the strongest if one conversation has all votes, since nothing can be held out. If
    there are many votes, some choose the scaling, which is the choice that takes the most time and the fewest votes."""
    if votes.groups == 1:
        return scalings[0], max(settings.l2_grid)
    some = select(votes, some_conversations(votes, SCALING_VOTES, generator))
    seed = int(torch.randint(2**31, (1,), generator=generator))
    losses = torch.stack([validated(scaling, features, some, settings, seed) for scaling in scalings])
    reached = losses.amin(dim=1)
    best = 0 if reached[0] < reached.min() + BETTER else int(reached.argmin())
    nll = losses[best] if len(some) == len(votes) else validated(scalings[best], features, votes, settings, seed)
    return scalings[best], settings.l2_grid[int(nll.argmin())]


def choose_prior(
    imported: ImportedPreferences,
    scaling: Standardiser,
    features: Tensor,
    votes: VoteTensors,
    l2: float,
    settings: RewardSettings,
    generator: torch.Generator,
) -> tuple[Prior | None, float]:
    """What imported preferences say, with the weight and the penalty that predict votes on features (N, F) best; None,
    and `l2`, if no weight is clearly better than none."""
    if votes.groups == 1:
        return None, l2
    standard, said = scaling(features), direction(imported, scaling, settings, generator)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    priors = [None, *(Prior.of(said, standard, weight) for weight in PRIOR_WEIGHTS)]
    losses = torch.stack([validated(scaling, features, votes, settings, seed, prior) for prior in priors])
    reached = losses.amin(dim=1)
    best = int(reached.argmin())
    if reached[0] < reached[best] + BETTER:
        return None, l2
    return priors[best], settings.l2_grid[int(losses[best].argmin())]


def coordinates(standard: Tensor, prior: Prior | None) -> Tensor:
    """(F, P) directions that a fit on standardised features (N, F) has weights for: their span, and a prior's own."""
    basis = fitting.span_basis(standard)
    return torch.cat([basis, prior.direction[:, None]], dim=1) if prior else basis


def validated(
    scaling: Standardiser,
    features: Tensor,
    votes: VoteTensors,
    settings: RewardSettings,
    seed: int,
    prior: Prior | None = None,
) -> Tensor:
    """(L,) cross-validated NLL of each penalty of the grid, averaged over several ways to make folds."""
    voted, votes = votes.voted(features)
    standard = scaling(voted)
    reduced, grid = standard @ coordinates(standard, prior), torch.tensor(settings.l2_grid)
    generator, folds = torch.Generator().manual_seed(seed), min(settings.folds, votes.groups)
    every = [
        evaluation.cross_validate(
            reduced, votes, grid, settings.label_smoothing, evaluation.fold_of(votes, folds, generator)
        ).nll
        for _ in range(settings.fold_repeats)
    ]
    return torch.stack(every).mean(dim=0)


def evaluate(model: LinearRewardModel, features: Tensor, votes: VoteTensors) -> HeldOut:
    """Metrics of the model's unstandardised head on votes it was not fitted on; the last feature is log length."""
    nothing = torch.zeros(1)
    as_head = Heads(model.weights[None], nothing, nothing, nothing, nothing, torch.zeros(1, votes.users))
    return evaluation.held_out(as_head, model.standardiser(features), votes, features[:, -1])

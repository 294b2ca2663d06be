"""Scales features to comparable size. Pure torch."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from learner.model.features import FeatureSpec

# Standard deviations from the mean at which log length is clamped.
MAX_LENGTH = 2.0
# The surface's variance where votes do not choose it: little is lost if they are about something else.
USUAL_SURFACE = 0.3


class Mix(NamedTuple):
    """The variance of each kind of features, all columns of it together."""

    words: float
    meaning: float
    surface: float


@dataclass(frozen=True)
class Standardiser:
    """(F,) mean and scale that bring features to comparable size: each kind has the variance of a mix, and the length
    has variance 1."""

    mean: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        standard = (features - self.mean) * self.scale
        # If nearly every answer is cut at one length, a short one is ten standard deviations out and would dominate a
        # linear head.
        return torch.cat([standard[..., :-1], standard[..., -1:].clamp(-MAX_LENGTH, MAX_LENGTH)], dim=-1)


def mixes(spec: FeatureSpec) -> list[Mix]:
    """The mixes to choose from, of the features that there are: words, meaning or both, with the surface or without.

    Votes about how an answer is put are learned from its words with a third of the votes that deeper layers need;
    people's votes on what different models said are learned from deeper layers alone (docs/decisions/0039)."""
    layers = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)] if spec.words and spec.meaning else [(1.0, 1.0)]
    surfaces = (0.0, 1.0) if spec.surface.shape[1] else (0.0,)
    return [Mix(words, meaning, surface) for words, meaning in layers for surface in surfaces]


def usual_mix(spec: FeatureSpec) -> Mix:
    """The mix where votes do not choose one."""
    return mixes(spec)[-1]._replace(surface=USUAL_SURFACE)


def standardiser(features: Tensor, spec: FeatureSpec, mix: Mix) -> Standardiser:
    """Fitted on features (N, F) of answers.

    All layers together weigh as much as the length alone, which is the one feature that never needs many votes."""
    mean, sd = features.mean(dim=0), features.std(dim=0, correction=0)
    # If all answers have one length, length says nothing.
    length = 1 / sd[-1:] if sd[-1] > 1e-3 else torch.zeros(1)
    kinds = features[:, :-1].split(spec.sizes(features.shape[1]), dim=1)
    scales = [states_scale(kind) * variance**0.5 for kind, variance in zip(kinds, mix, strict=True)]
    return Standardiser(mean, torch.cat([*scales, length]))


def states_scale(states: Tensor) -> Tensor:
    """(F,) what brings states (N, F) to a comparable size and to variance 1 all together. A state that is always the
    same says nothing."""
    if not states.shape[1]:
        return states.new_zeros(0)
    sd = states.std(dim=0, correction=0)
    scale: Tensor = torch.where(sd > 0, 1 / (sd + 1e-4 * sd.mean()), 0.0) / len(sd) ** 0.5
    return scale

"""Scales features to comparable size. Pure torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Standard deviations from the mean at which log length is clamped.
MAX_LENGTH = 2.0


@dataclass(frozen=True)
class Standardiser:
    """(F,) mean and scale that bring features to comparable size: all layers together, and the length, each have
    variance 1."""

    mean: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        standard = (features - self.mean) * self.scale
        # If nearly every answer is cut at one length, a short one is ten standard deviations out and would dominate a
        # linear head.
        return torch.cat([standard[..., :-1], standard[..., -1:].clamp(-MAX_LENGTH, MAX_LENGTH)], dim=-1)


def standardiser(features: Tensor) -> Standardiser:
    """Fitted on features (N, F) of answers: states of layers, then the length.

    All layers together weigh as much as the length alone, which is the one feature that never needs many votes."""
    mean, sd = features.mean(dim=0), features.std(dim=0, correction=0)
    # If all answers have one length, length says nothing.
    length = 1 / sd[-1:] if sd[-1] > 1e-3 else torch.zeros(1)
    return Standardiser(mean, torch.cat([states_scale(features[:, :-1]), length]))


def states_scale(states: Tensor) -> Tensor:
    """(F,) what brings states (N, F) to a comparable size and to variance 1 all together. A state that is always the
    same says nothing."""
    sd = states.std(dim=0, correction=0)
    scale: Tensor = torch.where(sd > 0, 1 / (sd + 1e-4 * sd.mean()), 0.0) / len(sd) ** 0.5
    return scale

"""Activation checkpointing: a layer's intermediate results are computed again in the backward pass instead of kept.

transformers checkpoints its layers only in training mode, which would turn dropout on; so their forward passes are
wrapped here. A layer that is computed again would write its keys and values to a cache again: checkpointed models get
no cache, and therefore share no prefix (`learner.model.forward.shares_prefix`).
"""

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from server.shared.model.merged import base_model


def checkpoint_layers(base: Any) -> None:
    """Checkpoints the layers of a Hugging Face model; for each, only its input is kept. Raises ValueError if it has
    none that can be computed again."""
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"The layers of {type(base).__name__} cannot be computed again: set policy.checkpoint_activations to off."
        )
    for layer in layers:
        # Nothing in a layer is random, since dropout is off. Not reentrant: with adapters, no input needs a gradient.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    base.layers_are_checkpointed = True


def checkpointed(model: Any) -> bool:
    """Whether `checkpoint_layers` was called on the model, which PEFT may have wrapped since."""
    return getattr(base_model(model), "layers_are_checkpointed", False)

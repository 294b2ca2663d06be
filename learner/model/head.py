"""Logits by a model's own code.

Families do different things between the last hidden state and the logits: they scale them (Granite, Cohere), cap them
(Gemma 2), or both. A forward pass is computed here in two parts, since logits are needed at few positions; so the
second part must be the model's own. It is run with a stand-in for the trunk, which returns the states that it is given.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from server.shared.model.merged import base_model


def trunk_of(base: Any) -> Any:
    """All but the head: what gives the last hidden states."""
    return getattr(base, base.base_model_prefix)


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """(N, V) logits in float32 of last hidden states (N, D), with their gradient."""
    base = base_model(model)
    name, trunk = base.base_model_prefix, trunk_of(base)
    # By way of `_modules`: assigning would move the module to the end of the model's order.
    base._modules[name] = _Given(trunk, hidden[None])
    try:
        logits: Tensor = base(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)).logits
    finally:
        base._modules[name] = trunk
    return logits[0].float()


class _Given(nn.Module):
    """In the trunk's place: it returns these states, and has the trunk's own values."""

    def __init__(self, trunk: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        vars(self).update(_trunk=trunk, _hidden=hidden)

    def forward(self, *_: Any, **__: Any) -> "_Output":
        return _Output(last_hidden_state=self._hidden)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._trunk, name)
        # OPT's head calls `model.decoder`.
        return self if isinstance(found, nn.Module) else found


class _Output(BaseModelOutputWithPast):
    """None for whatever else a trunk of the family would return, router logits say."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

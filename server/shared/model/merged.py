"""Merges adapters into their base, in the same way for the weights that the learner judges and the server serves.

The merge is in float32, then cast to the base's dtype. PEFT's own merging rounds the adapter's product to that dtype
first.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def load_adapted(base: Path, adapter: Path, dtype: "torch.dtype") -> Any:
    """The PEFT model of a published adapter on `base`, both Hugging Face directories."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)


def merged_weights(model: Any, adapters: bool = True) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield (checkpoint name, tensor in the model's dtype) of a Hugging Face model, bare or with PEFT adapters. A tied
    output matrix is left out: it is the embedding."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = dict(base.named_modules())
    tied = set(getattr(base, "_tied_weights_keys", None) or ()) if base.config.tie_word_embeddings else set()
    for name, tensor in base.state_dict().items():
        if ".lora_" in name or name in tied:
            continue
        if ".base_layer." not in name:
            yield name, tensor
            continue
        owner, _, leaf = name.partition(".base_layer.")
        if adapters and leaf == "weight":
            tensor = (tensor.float() + _delta(modules[owner])).to(tensor.dtype)
        yield f"{owner}.{leaf}", tensor


def _delta(layer: Any) -> "torch.Tensor":
    """What an adapter adds to a weight, in float32 whatever its dtype."""
    up, down = (part["default"].weight.detach().float() for part in (layer.lora_B, layer.lora_A))
    delta: torch.Tensor = (up @ down) * layer.scaling["default"]
    # GPT-2's layers keep their weights transposed.
    return delta.T if layer.fan_in_fan_out else delta

"""Merges adapters into their base, in the same way for the weights that the learner judges and the server serves.

The merge is in float32, then cast to the base's dtype. PEFT's own merging rounds the adapter's product to that dtype
first.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.shared.model.load import load_model

if TYPE_CHECKING:
    import torch


def base_model(model: Any) -> Any:
    """The Hugging Face model, without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_adapted(base: Path, adapter: Path, dtype: "torch.dtype", trust_remote_code: bool = False) -> Any:
    """The PEFT model of a published adapter on `base`, both Hugging Face directories."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(base, trust_remote_code, dtype=dtype), adapter)


def whole(tensor: "torch.Tensor") -> "torch.Tensor":
    """All of a tensor of which this process may have a shard; every worker must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def merged_weights(model: Any, adapters: bool = True) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield (name, tensor in the model's dtype) of a Hugging Face model, bare or with PEFT adapters. A tied output
    matrix is left out: it is the embedding."""
    base = base_model(model)
    tied = set(getattr(base, "_tied_weights_keys", None) or ()) if base.config.tie_word_embeddings else set()
    adapted = {_adapted_name(path, layer): layer for path, layer in base.named_modules() if hasattr(layer, "lora_A")}
    for path, tensor in base.state_dict().items():
        if ".lora_" in path or path in tied:
            continue
        name = path.replace(".base_layer", "")
        if adapters and name in adapted:
            tensor = (whole(tensor).float() + _delta(adapted[name])).to(tensor.dtype)
        yield name, whole(tensor)


def checkpoint_weights(model: Any, adapters: bool = True) -> "Iterator[tuple[str, torch.Tensor]]":
    """Like `merged_weights`, by the names and in the pieces of a checkpoint, which an engine expects: transformers
    keeps the experts of a layer as one tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    base = base_model(model)
    weights = merged_weights(model, adapters)
    # One after the other where nothing is to be converted: together they take as much memory as the model.
    converted = getattr(base, "_weight_conversions", None) or get_model_conversion_mapping(base, add_legacy=False)
    yield from revert_weight_conversion(base, dict(weights)).items() if converted else weights


def _adapted_name(path: str, layer: Any) -> str:
    """The weight that an adapter is added to. PEFT wraps a module once for each of its parameters."""
    return f"{path.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"


def _delta(layer: Any) -> "torch.Tensor":
    """What an adapter adds to a weight, in float32 whatever its dtype."""
    if getattr(layer, "num_experts", 1) > 1:
        left, right, scaling = layer.get_delta_factors("default")
        experts: torch.Tensor = whole(left.detach()).float() @ whole(right.detach()).float() * scaling
        return experts
    up, down = (whole(part["default"].weight.detach()).float() for part in (layer.lora_B, layer.lora_A))
    delta: torch.Tensor = (up @ down) * layer.scaling["default"]
    # GPT-2's layers keep their weights transposed.
    return delta.T if layer.fan_in_fan_out else delta

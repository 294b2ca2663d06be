"""Matrices that vLLM packs for its CPU kernels are packed again when weights are loaded again.

vLLM 0.32 misses two cases, both without an error. It packs the experts of a layer only when a model is first loaded
(`UnquantizedFusedMoEMethod._setup_kernel`): later the kernel reads unpacked matrices as packed ones. And it packs a
layer when weights are loaded into it: a head that shares the embedding's matrix is never loaded itself, and keeps the
old one.
"""

from collections import defaultdict
from functools import partial
from typing import Any

# The layer attribute in which vLLM keeps a packed matrix on a CPU: a function that holds it.
PACKED = "cpu_linear"


def keep_experts_packed(model: Any) -> None:
    """Make every later load of weights into `model` pack its experts. Call it once, after the first load."""
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) and layer.w13_weight.device.type == "cpu":
            method._setup_kernel = partial(_set_up_and_pack, method, method._setup_kernel)


def pack_tied_head(model: Any) -> None:
    """Pack a head that shares the embedding's matrix. Call it after every load of weights."""
    sharing = defaultdict(list)
    for layer in model.modules():
        if (weight := getattr(layer, "weight", None)) is not None:
            sharing[id(weight)].append(layer)
    for layers in sharing.values():
        for layer in layers:
            if len(layers) > 1 and PACKED in vars(layer):
                layer.quant_method.process_weights_after_loading(layer)


def _set_up_and_pack(method: Any, set_up: Any, layer: Any, **weights: Any) -> None:
    set_up(layer, **weights)
    method.moe_kernel.fused_experts.process_weights_after_loading(layer)

"""A policy whose weights are spread over workers, by torch's FSDP2 (`fully_shard`).

Each worker keeps its share of every weight, of its gradient and of Adam's moments; a layer is whole only while it
computes. Weights are gathered as a module is called, so each pass is one call of one module that has everything: the
trunk and the head are called apart (`learner.model.forward`), and would go past it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from server.shared.model.merged import base_model

T = TypeVar("T")


class Pass(nn.Module):
    """Any computation with a model, as one forward call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[Any], T]) -> T:
        return compute(self.model)


def shard(whole_pass: Pass, mesh: DeviceMesh) -> None:
    """Spreads the weights over the mesh, layer by layer, and moves them to its devices."""
    base = base_model(whole_pass.model)
    # Gradients of bfloat16 weights are added up in float32.
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, mp_policy=exact)
    # Gathered again in the backward pass: otherwise it would keep old weights after a pass that has none.
    fully_shard(whole_pass, mesh=mesh, mp_policy=exact, reshard_after_forward=True)
    for module in whole_pass.modules():
        if isinstance(module, FSDPModule):
            # A loss is divided by the tokens of all workers already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Not every expert is used by every worker.
            module.set_reduce_scatter_unused_params(True, recurse=False)
    base.is_sharded = True


def sharded(model: Any) -> bool:
    """Whether `shard` was called on the model, which PEFT may have wrapped."""
    return getattr(base_model(model), "is_sharded", False)


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This worker's share of a whole tensor, if `like` is such a share; otherwise the tensor."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)

"""A GPU that is only pretended: all data are on the CPU, and each storage is labelled with a device.

Within `pretended_gpu()` the code under test is unchanged: `torch.device("cuda")` works in factories, `.to` and
`from_pretrained(device_map=...)`, and a labelled tensor says that its device is `cuda:0`. Whatever CUDA would refuse
raises WrongDeviceError: an operation on tensors of both devices, a draw on the GPU from a generator on the CPU, and
`numpy()` of a tensor on the GPU. As with CUDA, tensors are copied between devices, a tensor on the GPU is indexed by
indices on the CPU, and a number on the CPU (a tensor without dimensions) goes with anything.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import PreTrainedModel

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COPIES = {"aten::copy_", "aten::_foreach_copy_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# These take no number from the CPU.
JOINS = {"aten::cat", "aten::stack"}


class WrongDeviceError(RuntimeError):
    """CUDA would refuse this."""


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Until the block ends, there is a GPU."""
    labels, load = Labels(), PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *arguments: Any, device_map: Any = None, **named: Any) -> Any:
        with _disable_current_modes():
            loaded = load.__func__(cls, *arguments, **named)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            for tensor in (*model.parameters(), *model.buffers()):
                labels.put(tensor, torch.device(device_map or "cpu"))
        return loaded

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        with Operations(labels), Functions(labels):
            yield
    finally:
        PreTrainedModel.from_pretrained = load


class Labels:
    """The device that each storage claims to be on."""

    def __init__(self) -> None:
        # By address, which the weak reference keeps from being used again after the storage is freed.
        self._on_gpu: dict[int, StorageWeakRef] = {}
        # Where a tensor is that an operation makes out of nothing.
        self.default = CPU

    def of(self, tensor: Tensor) -> torch.device:
        if tensor.device != CPU:
            return tensor.device
        return GPU if address(tensor) in self._on_gpu else CPU

    def put(self, tensor: Tensor, device: torch.device) -> None:
        if device.type == "cuda":
            self._on_gpu[address(tensor)] = StorageWeakRef(tensor.untyped_storage())
        else:
            self._on_gpu.pop(address(tensor), None)

    @contextmanager
    def making(self, device: torch.device) -> Iterator[None]:
        before, self.default = self.default, device
        try:
            yield
        finally:
            self.default = before


class Functions(TorchFunctionMode):
    """Reads and changes the devices in calls from Python."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self._labels = labels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return self._labels.of(args[0])
        if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            return self._labels.of(args[0]) == (GPU if func == Tensor.is_cuda.__get__ else CPU)
        if func in (Tensor.numpy, Tensor.__array__) and self._labels.of(args[0]) == GPU:
            raise WrongDeviceError("numpy() of a tensor on the GPU")
        if func == Tensor.grad.__set__ and args[1] is not None and self._labels.of(args[0]) != self._labels.of(args[1]):
            raise WrongDeviceError("a gradient on another device than its tensor")
        if func == Tensor.backward:
            # Checkpointed activations call the code under test again.
            with self:
                return torch.autograd.backward(args[0], named.get("gradient"), named.get("retain_graph"))
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(func, *args, **named)
        return self._call(func, args, named)

    def _move(self, func: Any, tensor: Tensor, *args: Any, **named: Any) -> Tensor:
        if func != Tensor.to:
            return self._placed(tensor, GPU if func == Tensor.cuda else CPU, [tensor])
        like = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
        if like:
            device, dtype = self._labels.of(like[0]), like[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **named)
        moved = tensor.to(dtype) if dtype else tensor
        return self._placed(moved, device, [tensor]) if device else moved

    def _call(self, func: Callable[..., Any], args: Any, named: dict[str, Any]) -> Any:
        inputs = tensors((args, named))
        device = None if named.get("device") is None else torch.device(named["device"])
        if device and device.type == "cuda":
            if (generator := named.get("generator")) is not None and generator.device.type == "cpu":
                raise WrongDeviceError(f"{func}: a draw on the GPU from a generator on the CPU")
            named["device"] = CPU
        with self._labels.making(GPU if any(self._labels.of(tensor) == GPU for tensor in inputs) else CPU):
            result = func(*args, **named)
        if func == Tensor.__deepcopy__:
            self._labels.put(result, self._labels.of(args[0]))
        return self._placed(result, device, inputs) if device and isinstance(result, Tensor) else result

    def _placed(self, tensor: Tensor, device: torch.device, inputs: list[Tensor]) -> Tensor:
        """The tensor on `device`: a copy if it shares its storage with an input elsewhere."""
        if device.type == "meta" or self._labels.of(tensor).type == device.type:
            return tensor
        if address(tensor) in map(address, inputs):
            tensor = tensor.clone()
        self._labels.put(tensor, device)
        return tensor


class Operations(TorchDispatchMode):
    """Checks the devices of every operation, those of backward passes included, and labels what it makes."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self._labels = labels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            inputs = tensors((args, kwargs))
            device = self._device(func, args, kwargs or {}, inputs)
            known = set(map(address, inputs))
            result = func(*args, **(kwargs or {}))
            for tensor in tensors(result):
                if address(tensor) not in known:
                    self._labels.put(tensor, device)
        return result

    def _device(self, func: Any, args: Any, kwargs: dict[str, Any], inputs: list[Tensor]) -> torch.device:
        """The device of the operation's new tensors. Raises WrongDeviceError."""
        name, of = func._schema.name, self._labels.of
        if not inputs or name in COPIES or any(tensor.device != CPU for tensor in inputs):
            return self._labels.default
        if name in INDEXING:
            indices = tensors(args[1])
            if of(args[0]) == CPU and any(of(index) == GPU for index in indices):
                raise WrongDeviceError(f"{name}: a tensor on the CPU, indexed by one on the GPU")
            inputs = [args[0], *tensors(args[2:])]
        many = {of(tensor) for tensor in inputs if tensor.dim() or name in JOINS}
        numbers = {of(tensor) for tensor in inputs if not tensor.dim()}
        device = GPU if GPU in many | numbers else CPU
        written = {
            of(value)
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info and argument.alias_info.is_write and isinstance(value, Tensor)
        }
        if len(many) > 1 or (many == {CPU} and GPU in numbers) or not written <= {device}:
            raise WrongDeviceError(f"{name}: tensors on the GPU and on the CPU")
        if device == GPU and any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            raise WrongDeviceError(f"{name}: a draw on the GPU from a generator on the CPU")
        return device


def tensors(values: Any) -> list[Tensor]:
    """All tensors in nested values."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in tensors(value)]


def address(tensor: Tensor) -> int:
    """The address of the tensor's storage."""
    return tensor.untyped_storage()._cdata

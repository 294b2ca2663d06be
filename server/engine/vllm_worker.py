"""The part of a swap that runs inside vLLM's worker: a live model that answers, and a spare one to read weights into.

vLLM calls these methods through `collective_rpc` on its worker (`worker_extension_cls`). The engine does not step while
one of them runs, so weights are read on a thread, into the spare model, and `prefloop_staged` only polls the progress.
A swap exchanges the two models' weights. On a CPU the packed matrices are exchanged as objects; everything else, and
all weights on a GPU, where captured graphs hold on to addresses, are copied. The spare then has the old weights, so
that a rollback is the same exchange again. The result is compared with digests that were taken of the spare.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from server.engine.weights import finite_tensors
from server.shared.failpoints import failpoint
from server.shared.model.packing import PACKED, keep_experts_packed, pack_tied_head


class SwapExtension:
    """Mixed into the worker; the names are prefixed because they share its namespace."""

    model_runner: Any
    vllm_config: Any
    _prefloop_thread: threading.Thread | None = None

    def prefloop_prepare(self) -> None:
        """Build the spare model. Call it once, before the first request: this changes torch's defaults."""
        self._prefloop_spare = second_model(self.model_runner.get_model(), self.vllm_config)
        keep_experts_packed(self._prefloop_spare)
        self._prefloop_digests = digests(self._prefloop_spare)
        self._prefloop_live_digests = digests(self.model_runner.get_model())

    def prefloop_stage(self, directory: str) -> bool:
        """Start reading the weights in `directory` into the spare model; False if an earlier read is still running."""
        if self._prefloop_reading():
            return False
        self._prefloop_error = ""
        self._prefloop_thread = threading.Thread(target=self._prefloop_read, args=(directory,), daemon=True)
        self._prefloop_thread.start()
        return True

    def prefloop_staged(self) -> str | None:
        """None while reading; then the reason why the weights cannot be used, or an empty string."""
        return None if self._prefloop_reading() else self._prefloop_error

    def prefloop_exchange(self) -> str:
        """Exchange the weights of the live and the spare model. Call it only while the engine is paused.

        Returns an empty string, or the reason for a failure, after which the old weights are live again."""
        live, spare = self.model_runner.get_model(), self._prefloop_spare
        exchange(live, spare)
        failpoint("exchange")
        try:
            wrong = differing(digests(live), self._prefloop_digests)
        except Exception:
            exchange(live, spare)
            raise
        if wrong:
            exchange(live, spare)
            reason = f"the checksum of {wrong} differs from that of the weights that were read"
            still = differing(digests(live), self._prefloop_live_digests)
            return f"{reason}; after going back, the checksum of {still} differs from before" if still else reason
        self._prefloop_digests, self._prefloop_live_digests = self._prefloop_live_digests, self._prefloop_digests
        return ""

    def _prefloop_reading(self) -> bool:
        return self._prefloop_thread is not None and self._prefloop_thread.is_alive()

    def _prefloop_read(self, directory: str) -> None:
        try:
            # Use only one of the cores that answers need.
            torch.set_num_threads(1)
            load(self._prefloop_spare, self.vllm_config, Path(directory))
            self._prefloop_digests = digests(self._prefloop_spare)
        # Nothing catches a thread's exception: report the reason through prefloop_staged.
        except Exception as error:
            self._prefloop_error = f"{Path(directory).name}: {error}"


def load(model: torch.nn.Module, config: Any, directory: Path) -> None:
    """Read all of a model's weights as vLLM does at its start. Raises ValueError for one that is missing or not
    finite."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    expected = {name for name, _ in model.named_parameters()}
    initialize_layerwise_reload(model)
    try:
        loaded = model.load_weights(finite_tensors(directory))  # type: ignore[operator]
    finally:
        # Also after a failure: this restores the layers' old weights, so that the next version can be read.
        finalize_layerwise_reload(model, config.model_config)
        pack_tied_head(model)
    if missing := sorted(expected - set(loaded)):
        raise ValueError(f"there are no weights for {missing[0]}")


def exchange(live: torch.nn.Module, spare: torch.nn.Module) -> None:
    """Exchange the weights of two models; a failure half-way is undone."""
    done: list[Callable[[], None]] = []
    try:
        for step in exchanges(live, spare):
            step()
            done.append(step)
    except Exception:
        for step in reversed(done):
            step()
        raise


def exchanges(live: torch.nn.Module, spare: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """Yield steps that are each their own inverse, one for every tensor and every packed matrix."""
    # By model and not by layer, so that tied weights come once.
    ours, theirs = (chain(model.parameters(), model.buffers()) for model in (live, spare))
    for one, other in zip(ours, theirs, strict=True):
        yield partial(exchange_tensors, one.data, other.data)
    for one_layer, other_layer in zip(live.modules(), spare.modules(), strict=True):
        if PACKED in vars(one_layer):
            yield partial(exchange_packed, one_layer, other_layer)


def exchange_tensors(one: torch.Tensor, other: torch.Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def exchange_packed(one: torch.nn.Module, other: torch.nn.Module) -> None:
    packed = getattr(one, PACKED)
    setattr(one, PACKED, getattr(other, PACKED))
    setattr(other, PACKED, packed)


def differing(found: dict[str, str], expected: dict[str, str]) -> str | None:
    """The first name under which the two differ, or None."""
    return next((name for name in sorted(expected) if found.get(name) != expected[name]), None)


def digests(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor, and the identity of every packed matrix, which is never written to."""
    from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

    packed = {
        f"{name}.{PACKED}": str(id(getattr(module, PACKED)))
        for name, module in model.named_modules()
        if PACKED in vars(module)
    }
    return {**compute_tensor_digests(model), **packed}


def second_model(first: torch.nn.Module, config: Any) -> torch.nn.Module:
    """A second model, with the weights that the engine started with, that shares nothing with `first`."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    # Layers register themselves by name, so give this model its own register.
    config = copy.copy(config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    with set_current_vllm_config(config):
        model: torch.nn.Module = get_model_loader(config.load_config).load_model(config, config.model_config)
    unshare(model, first)
    return model


def unshare(model: torch.nn.Module, first: torch.nn.Module) -> None:
    """Give `model` its own copy of every module that it shares with `first`: vLLM shares rotary embeddings among all
    models, and reading weights takes a model's modules apart."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    common = set(first.modules())
    own: dict[torch.nn.Module, torch.nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in common:
                if child not in own:
                    own[child] = copy.deepcopy(child)
                    record_metadata_for_reloading(own[child])
                setattr(parent, name, own[child])

"""Swaps of two models without an engine: exchange, partial failures, checksums, and no shared modules."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import server.engine.vllm_worker as worker
from server.engine.vllm_worker import SwapExtension, exchange, unshare
from server.engine.weights import finite_tensors


class Model(nn.Module):
    """An embedding that is tied to the head, a layer with a packed matrix, and a buffer."""

    def __init__(self, value: float, rotary: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight
        self.layer = nn.Linear(2, 2)
        self.layer.cpu_linear = f"packed {value}"  # type: ignore[assignment]
        self.rotary = rotary or nn.Identity()
        self.register_buffer("scale", torch.tensor([value]))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(value)

    def values(self) -> set[Any]:
        tensors = [tensor for tensor in (*self.parameters(), *self.buffers()) for tensor in tensor.flatten().tolist()]
        return {*tensors, self.layer.cpu_linear}


def sums(model: nn.Module) -> dict[str, str]:
    found = {name: str(tensor.sum().item()) for name, tensor in model.named_parameters()}
    return {**found, "layer.cpu_linear": str(model.layer.cpu_linear)}


@pytest.fixture
def swapping(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker with the weights 1 that has read the weights 2."""
    monkeypatch.setattr(worker, "digests", sums)
    live, spare = Model(1.0), Model(2.0)
    extension: Any = SwapExtension()
    extension.model_runner = SimpleNamespace(get_model=lambda: live)
    extension._prefloop_spare = spare
    extension._prefloop_digests, extension._prefloop_live_digests = sums(spare), sums(live)
    return extension


def test_an_exchange_is_complete_and_its_own_inverse() -> None:
    live, spare = Model(1.0), Model(2.0)
    addresses = [parameter.data_ptr() for parameter in live.parameters()]
    exchange(live, spare)
    # Tied weights were exchanged once; twice would undo it.
    assert (live.values(), spare.values()) == ({2.0, "packed 2.0"}, {1.0, "packed 1.0"})
    # In place: captured graphs hold on to addresses.
    assert [parameter.data_ptr() for parameter in live.parameters()] == addresses
    exchange(live, spare)
    assert (live.values(), spare.values()) == ({1.0, "packed 1.0"}, {2.0, "packed 2.0"})


def test_an_exchange_that_fails_half_way_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    live, spare = Model(1.0), Model(2.0)

    def broken(one: nn.Module, other: nn.Module) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(worker, "exchange_packed", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        exchange(live, spare)
    assert (live.values(), spare.values()) == ({1.0, "packed 1.0"}, {2.0, "packed 2.0"})


def test_the_live_weights_are_those_read_and_a_rollback_reads_nothing(swapping: Any) -> None:
    assert swapping.prefloop_exchange() == ""
    assert swapping.model_runner.get_model().values() == {2.0, "packed 2.0"}
    assert swapping.prefloop_exchange() == ""
    assert swapping.model_runner.get_model().values() == {1.0, "packed 1.0"}


def test_a_different_checksum_restores_the_old_weights(swapping: Any) -> None:
    with torch.no_grad():
        swapping._prefloop_spare.layer.bias[0] = 7.0  # After its digests were taken.
    said = swapping.prefloop_exchange()
    assert said == "the checksum of layer.bias differs from that of the weights that were read"
    assert swapping.model_runner.get_model().values() == {1.0, "packed 1.0"}


def test_a_packed_matrix_of_another_version_is_detected(swapping: Any) -> None:
    swapping._prefloop_spare.layer.cpu_linear = "packed 3.0"
    assert swapping.prefloop_exchange().startswith("the checksum of layer.cpu_linear differs")
    assert swapping.model_runner.get_model().values() == {1.0, "packed 1.0"}


def test_old_weights_that_are_not_restored_are_reported(swapping: Any) -> None:
    swapping._prefloop_digests = {**swapping._prefloop_digests, "layer.bias": "0"}
    swapping._prefloop_live_digests = {**swapping._prefloop_live_digests, "layer.weight": "0"}
    said = swapping.prefloop_exchange()
    assert said.endswith("after going back, the checksum of layer.weight differs from before")


def test_a_failed_check_restores_the_old_weights(swapping: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module) -> dict[str, str]:
        raise MemoryError

    monkeypatch.setattr(worker, "digests", broken)
    with pytest.raises(MemoryError):
        swapping.prefloop_exchange()
    assert swapping.model_runner.get_model().values() == {1.0, "packed 1.0"}


def test_one_version_is_read_at_a_time(swapping: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, may_end = threading.Event(), threading.Event()

    def slow(model: nn.Module, config: Any, directory: Path) -> None:
        reading.set()
        assert may_end.wait(10)

    monkeypatch.setattr(worker, "load", slow)
    swapping.vllm_config = None
    assert swapping.prefloop_stage("v0002") is True
    assert reading.wait(10)
    # Abandoned by its caller, but still reading into the spare model.
    assert swapping.prefloop_stage("v0003") is False
    assert swapping.prefloop_staged() is None
    may_end.set()
    swapping._prefloop_thread.join(10)
    assert swapping.prefloop_staged() == ""
    assert swapping.prefloop_stage("v0003") is True


def test_the_second_model_shares_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.model_executor.model_loader.reload as reload

    recorded: list[nn.Module] = []
    monkeypatch.setattr(reload, "record_metadata_for_reloading", recorded.append)
    rotary = nn.Linear(1, 1)
    first, second = Model(1.0, rotary), Model(1.0, rotary)
    second.also = nn.Sequential(rotary)  # type: ignore[assignment]
    unshare(second, first)
    assert not set(first.modules()) & set(second.modules())
    # One copy, as there was one original.
    assert second.rotary is second.also[0]  # type: ignore[index]
    assert recorded == [second.rotary]


def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path) -> None:
    good, bad = torch.zeros(2), torch.tensor([1.0, float("inf")])
    save_file({"a": good, "b": bad}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="b has values that are not finite"):
        dict(finite_tensors(tmp_path))

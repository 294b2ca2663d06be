"""What the server's engine does around vLLM, which a fake replaces; the real one is tested in tests/e2e."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from server.engine import vllm_engine
from server.engine.adapter_engine import AdapterEngine
from server.engine.base import SwapError
from server.engine.vllm_engine import VllmEngine
from server.engine.watchdog import Pulse
from server.shared.errors import UnavailableError
from server.store.files.manifest import new_version
from tests.learner.conftest import save_tiny_model


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class FakeVllm:
    """An engine that answers every call, and whose process has just beaten. `busy` is whether it has work."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.get_tokenizer = lambda: AutoTokenizer.from_pretrained(directory)
        self.model_config = SimpleNamespace(hf_config=AutoConfig.from_pretrained(directory))
        self.output_processor = SimpleNamespace(has_unfinished_requests=lambda: self.busy)
        self.errored = self.busy = False
        pulse = Pulse.find()
        assert pulse is not None
        pulse.beat(clock.now)

    async def collective_rpc(self, name: str) -> list[None]:
        return [None]

    async def update_weight_version(self, version: str) -> None:
        self.label = version

    def shutdown(self, seconds: float) -> None:
        self.errored = True


async def test_an_engine_has_the_label_of_its_reference_also_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "v0007"
    save_tiny_model(directory)
    checked: list[str] = []
    monkeypatch.setattr(vllm_engine, "verify", lambda directory: checked.append(directory.name))
    started: list[FakeVllm] = []

    def start(_: Path) -> FakeVllm:
        started.append(FakeVllm(directory, Clock()))
        return started[-1]

    engine = VllmEngine(start, directory, "float32")
    try:
        assert (engine.version, engine.reference) == ("v0007", "v0007")
        started[0].errored = True
        await engine.revive()
        assert (engine.version, checked, started[1].label) == ("v0007", ["v0007"], "v0007")
        # A version that was loaded is loaded again; if it cannot be, the reference answers.
        engine._version, engine._directory = "v0009", tmp_path / "v0009"
        started[1].errored = True
        # The fake cannot stage one.
        with pytest.raises(TypeError):
            await engine.revive()
        assert (engine.version, engine.alive) == ("v0007", True)
    finally:
        await engine.close()


async def test_a_new_engine_has_not_hung_since_before_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path)
    clock = Clock()
    monkeypatch.setattr(vllm_engine, "time", clock)
    monkeypatch.setattr(vllm_engine, "verify", lambda directory: None)
    started: list[FakeVllm] = []

    def start(_: Path) -> FakeVllm:
        started.append(FakeVllm(tmp_path, clock))
        return started[-1]

    engine = VllmEngine(start, tmp_path, "float32")
    engine._admitted.set()
    try:
        started[0].busy = True
        assert engine.probe(None) is None
        started[0].errored = True
        clock.now += 40
        await engine.revive()
        started[1].busy = True
        assert engine.probe(None) is None
        clock.now += 9
        assert engine.probe(None) is None
    finally:
        await engine.close()


async def test_an_engine_that_could_not_start_again_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path)
    monkeypatch.setattr(vllm_engine, "verify", lambda directory: None)
    started: list[FakeVllm | None] = []

    def start(_: Path) -> FakeVllm:
        if len(started) == 1:
            started.append(None)
            raise RuntimeError("no memory")
        started.append(FakeVllm(tmp_path, Clock()))
        return started[-1]  # type: ignore[return-value]

    engine = VllmEngine(start, tmp_path, "float32")
    try:
        started[0].errored = True  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="no memory"):
            await engine.revive()
        assert not engine.alive
        await engine.revive()
        assert (engine.alive, len(started)) == (True, 3)
    finally:
        await engine.close()


class AdapterVllm(FakeVllm):
    """One that loads adapters."""

    async def collective_rpc(self, name: str, args: tuple[object, ...] = ()) -> list[None]:
        return [None]

    async def add_lora(self, request: object) -> bool:
        return True


def publish_adapters(policies: Path) -> None:
    """References v0000 and v0002, and an adapter on each."""
    for reference, adapter in (("v0000", "v0001"), ("v0002", "v0003")):
        with new_version(policies / reference, kind="full", reference_version=reference) as staging:
            save_tiny_model(staging)
        with new_version(policies / adapter, kind="adapter", reference_version=reference) as staging:
            save_file({"a": torch.zeros(1)}, staging / "adapter_model.safetensors")


@pytest.mark.parametrize("fails", [False, True])
async def test_adapters_on_another_reference_restart_the_engine(tmp_path: Path, fails: bool) -> None:
    publish_adapters(tmp_path)
    started: list[str] = []

    def start(reference: Path) -> AdapterVllm:
        started.append(reference.name)
        if fails and reference.name == "v0002":
            raise RuntimeError("no memory")
        return AdapterVllm(reference, Clock())

    engine = AdapterEngine(start, tmp_path / "v0000", "float32")
    engine._admitted.set()
    try:
        await engine.swap("v0001", tmp_path / "v0001")
        # Beside the active one it cannot be loaded: that has another reference.
        with pytest.raises(SwapError, match=r"v0003 is an adapter on v0002, but the engine has v0000\."):
            await engine.keep_live("v0003", tmp_path / "v0003")
        if fails:
            with pytest.raises(SwapError, match="the engine could not start with v0003: no memory"):
                await engine.swap("v0003", tmp_path / "v0003")
            assert (engine.version, engine.reference, started) == ("v0001", "v0000", ["v0000", "v0002", "v0000"])
        else:
            await engine.swap("v0003", tmp_path / "v0003")
            assert (engine.version, engine.reference, started) == ("v0003", "v0002", ["v0000", "v0002"])
            await engine.swap("v0002", tmp_path / "v0002")
            assert (engine.version, engine.reference, started) == ("v0002", "v0002", ["v0000", "v0002"])
            # An answer that waited for a version of the reference before is to be asked for again.
            with pytest.raises(UnavailableError, match="v0001 is not loaded any more; v0002 is"):
                engine._adapter("v0001")
            # And back.
            await engine.swap("v0001", tmp_path / "v0001")
            assert (engine.version, engine.reference, started) == ("v0001", "v0000", ["v0000", "v0002", "v0000"])
        assert engine.alive
        assert engine._admitted.is_set()
    finally:
        await engine.close()


@pytest.mark.parametrize("damage", ["reference", "adapter"])
async def test_damaged_files_are_found_before_the_engine_is_stopped(tmp_path: Path, damage: str) -> None:
    publish_adapters(tmp_path)
    started: list[str] = []

    def start(reference: Path) -> AdapterVllm:
        started.append(reference.name)
        return AdapterVllm(reference, Clock())

    engine = AdapterEngine(start, tmp_path / "v0000", "float32")
    engine._admitted.set()
    try:
        await engine.swap("v0001", tmp_path / "v0001")
        if damage == "reference":
            (tmp_path / "v0002" / "config.json").write_text("{}")
        else:
            save_file({"a": torch.tensor([float("nan")])}, tmp_path / "v0003" / "adapter_model.safetensors")
        with pytest.raises(SwapError, match="SHA-256" if damage == "reference" else "not finite"):
            await engine.swap("v0003", tmp_path / "v0003")
        assert (engine.version, started) == ("v0001", ["v0000"])
        assert engine._admitted.is_set()
    finally:
        await engine.close()


async def test_an_adapter_that_cannot_be_loaded_after_the_restart_leaves_what_was_there(tmp_path: Path) -> None:
    publish_adapters(tmp_path)

    class Refusing(AdapterVllm):
        async def add_lora(self, request: Any) -> bool:
            if request.lora_name == "v0003":
                raise ValueError("unsupported")
            return True

    started: list[str] = []

    def start(reference: Path) -> Refusing:
        started.append(reference.name)
        return Refusing(reference, Clock())

    engine = AdapterEngine(start, tmp_path / "v0000", "float32")
    engine._admitted.set()
    try:
        await engine.swap("v0001", tmp_path / "v0001")
        with pytest.raises(SwapError, match="the engine could not start with v0003"):
            await engine.swap("v0003", tmp_path / "v0003")
        assert (engine.version, engine.reference, started) == ("v0001", "v0000", ["v0000", "v0002", "v0000"])
    finally:
        await engine.close()


async def test_running_answers_end_before_the_reference_is_changed(tmp_path: Path) -> None:
    publish_adapters(tmp_path)
    engines: list[AdapterVllm] = []

    def start(reference: Path) -> AdapterVllm:
        engines.append(AdapterVllm(reference, Clock()))
        return engines[-1]

    engine = AdapterEngine(start, tmp_path / "v0000", "float32")
    engine._admitted.set()
    try:
        engines[0].busy = True
        swap = asyncio.create_task(engine.swap("v0003", tmp_path / "v0003"))
        while engine._admitted.is_set():
            await asyncio.sleep(0)
        # New answers wait, and the engine is there for those that run. What it reports is what it has.
        assert (len(engines), engines[0].errored, swap.done(), engine.version) == (1, False, False, "v0000")
        engines[0].busy = False
        await asyncio.wait_for(swap, 30)
        assert (len(engines), engine.reference) == (2, "v0002")
    finally:
        await engine.close()

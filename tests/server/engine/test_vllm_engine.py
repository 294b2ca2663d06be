"""What the server's engine does around vLLM, which a fake replaces; the real one is tested in tests/e2e."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer

from server.engine import vllm_engine
from server.engine.vllm_engine import VllmEngine
from server.engine.watchdog import Pulse
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

    def start() -> FakeVllm:
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

    def start() -> FakeVllm:
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

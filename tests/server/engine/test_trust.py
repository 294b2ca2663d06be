"""Both engines are told whether to run a model's code."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from learner.model import rollout
from learner.model.rollout import RolloutEngine
from learner.settings import LearnerSettings
from server.engine.vllm_start import start_engine
from server.settings import ServerSettings
from tests.learner.conftest import save_tiny_model


class Recorded(Exception):
    """Carries an engine's arguments, instead of starting it."""


def record(**arguments: Any) -> None:
    raise Recorded(arguments)


class FakeRotary:
    def forward_cpu(self) -> None: ...


# What the two imports of an engine need of vLLM, whose own import takes seconds.
VLLM = {
    "vllm": {"LLM": record},
    "vllm.config.lora": {"MaxLoRARanks": Literal[16]},
    "vllm.engine.arg_utils": {"AsyncEngineArgs": record},
    "vllm.model_executor.layers.rotary_embedding.base": {"RotaryEmbedding": FakeRotary},
    "vllm.utils.ompmultiprocessing": {"OMPProcessManager": None},
    "vllm.v1.engine.async_llm": {"AsyncLLM": None},
    "vllm.v1.executor.uniproc_executor": {"UniProcExecutor": None},
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in VLLM:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            parent = ".".join(parts[:length])
            module = ModuleType(parent)
            vars(module).update(VLLM.get(parent, {}))
            monkeypatch.setitem(sys.modules, parent, module)
    monkeypatch.setattr(rollout, "set_environment", lambda settings: None)
    save_tiny_model(tmp_path)
    return tmp_path


def serving(model: Path, trust: bool) -> None:
    start_engine(ServerSettings(trust_remote_code=trust), "float32", model)


def rolling_out(model: Path, trust: bool) -> None:
    RolloutEngine(model, LearnerSettings(trust_remote_code=trust), "float32", 64)


@pytest.mark.parametrize("start", [serving, rolling_out])
@pytest.mark.parametrize("trust", [True, False])
def test_an_engine_is_told(model: Path, start: Callable[[Path, bool], None], trust: bool) -> None:
    with pytest.raises(Recorded) as recorded:
        start(model, trust)
    assert recorded.value.args[0]["trust_remote_code"] is trust


def test_the_default_is_not_to() -> None:
    assert ServerSettings().trust_remote_code is LearnerSettings().trust_remote_code is False

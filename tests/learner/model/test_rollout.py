"""The learner's engine: on a GPU it sleeps between a batch and the next push, and its answers end at a prompt's stop
sequences. vLLM is a stand-in."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import learner.model.rollout as module
from learner.model.rollout import RolloutEngine
from learner.settings import LearnerSettings
from server.store.chats.records import Prompt


class Llm:
    """Notes what is asked of vLLM."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.calls = arguments, []  # type: ignore[var-annotated]

    def collective_rpc(self, call: Any, kwargs: Any = None) -> None:
        if isinstance(call, str):
            self.calls.append(call)

    def generate(self, prompts: list[Any], samplings: list[Any], use_tqdm: bool) -> list[Any]:
        """Answers every prompt with the words of three tokens, "w16 w17 w18"."""
        self.samplings = samplings
        tokens = [16, 17, 18]
        logprobs = [{token: SimpleNamespace(logprob=-0.5)} for token in tokens]
        output = SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="stop", stop_reason=None)
        return [SimpleNamespace(outputs=[output]) for _ in prompts]

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return True


class FakeRotary:
    def forward_cpu(self) -> None: ...


def make_engine(device: str, uses_gpu: bool, directory: Path, monkeypatch: pytest.MonkeyPatch) -> RolloutEngine:
    vllm: Any = SimpleNamespace(LLM=Llm, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    rotary = SimpleNamespace(RotaryEmbedding=FakeRotary)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.rotary_embedding.base", rotary)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "set_environment", lambda settings: None)
    monkeypatch.setattr(module, "engine_uses_gpu", lambda: uses_gpu)
    monkeypatch.setattr(module, "resolve_device", lambda setting: torch.device(setting))
    return RolloutEngine(directory, LearnerSettings.from_values({"learner_device": device}), "float32", 64)


def start(device: str, uses_gpu: bool, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Llm:
    """The calls of a push, a batch, another push, and one more."""
    engine = make_engine(device, uses_gpu, directory, monkeypatch)
    engine.push(iter(()))
    engine.sleep()
    engine.push(iter(()))
    engine.push(iter(()))
    llm: Llm = engine._llm
    return llm


def test_it_sleeps_until_the_next_push(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = start("cuda", True, model_directory, monkeypatch)
    assert llm.arguments["enable_sleep_mode"] is True
    assert llm.calls == [
        "reload_weights", "reset_prefix_cache",
        "sleep 1",
        "wake weights", "reload_weights", "wake kv_cache", "reset_prefix_cache",
        "reload_weights", "reset_prefix_cache",
    ]  # fmt: skip


@pytest.mark.parametrize(("device", "uses_gpu"), [("cpu", False), ("cpu", True), ("cuda", False)])
def test_it_stays_awake_if_trainer_and_engine_do_not_share_a_gpu(
    device: str, uses_gpu: bool, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = start(device, uses_gpu, model_directory, monkeypatch)
    assert llm.arguments["enable_sleep_mode"] is False
    assert llm.calls == ["reload_weights", "reset_prefix_cache"] * 3
    assert hasattr(FakeRotary.forward_cpu, "__wrapped__")


def test_an_answer_ends_before_its_prompts_stop_sequence(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("cpu", False, model_directory, monkeypatch)
    prompts = [Prompt("", [15], 8, stop=stop) for stop in ((), (" w17", "w19"), ("7",), ("w19",))]
    found = [(one.token_ids, one.text, one.finish_reason, one.ended) for one in engine.sample(prompts, seed=1)]
    # As voters saw it: what comes after is neither trained on nor scored.
    assert found == [
        ([16, 17, 18], "w16 w17 w18", "stop", True),
        ([16], " w16", "stop_sequence", True),
        # A token with the text's end and the sequence's beginning stays.
        ([16, 17], " w16 w1", "stop_sequence", True),
        ([16, 17, 18], " w16 w17 w18", "stop", True),
    ]
    assert [(one.stop, one.detokenize) for one in engine._llm.samplings] == [
        ([], False), ([" w17", "w19"], True), (["7"], True), (["w19"], True),
    ]  # fmt: skip

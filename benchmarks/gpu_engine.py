"""The learner's engine on a GPU, for `gpu.py`."""

import gc
import importlib.util
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_update import (
    RESPONSES,
    SHAPES,
    TEMPERATURE,
    TOKENS_AT_ONCE,
    figures,
    make_engine,
    make_model,
    make_rollout,
    say,
    wait,
)

from learner.model.mismatch import mismatch
from learner.model.passes import policy_logprobs
from learner.model.rollout import SampledAnswer, to_rollout


def try_engine(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"skipped": "no GPU"}
    if importlib.util.find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed"}
    gc.collect()
    torch.cuda.empty_cache()
    found = engine_figures(SHAPES["135M"], device)
    say(f"engine: {figures(found)}")
    return found


def engine_figures(config: Any, device: torch.device) -> dict[str, float]:
    """The learner's engine in this process with the trainer: seconds of its start, of a push, during which it does not
    sample, of falling asleep, and of a push that wakes it; sampled tokens per second; GiB that sleeping frees; and the
    distance of its log-probabilities from the trainer's before it slept and after."""
    from learner.model.rollout import RolloutEngine
    from server.store.chats.records import Prompt

    def timed(call: Any, *arguments: Any) -> tuple[float, Any]:
        started = time.perf_counter()
        result = call(*arguments)
        wait(device)
        return time.perf_counter() - started, result

    def distance(samples: list[SampledAnswer]) -> float:
        rollout = to_rollout(samples).to(device)
        logprobs = policy_logprobs(policy, rollout.tokens, TEMPERATURE, TOKENS_AT_ONCE)
        return mismatch(logprobs, rollout.behavior_logprobs, rollout.tokens.response_mask).rms

    prompts = [
        Prompt(str(row), sample.prompt, 64)
        for row, sample in enumerate(make_rollout([1] * RESPONSES, config.vocab_size).samples)
    ]
    settings: Any = SimpleNamespace(
        service_temperature=TEMPERATURE, learner_device="cuda", learner_gpu_memory_share=0.3, seed=0, kv_cache_gib=1,
        cpu_threads="auto",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        save_for_engine(make_model(config, torch.bfloat16, device), Path(work))
        start, engine = timed(RolloutEngine, Path(work), settings, "bfloat16", 256)
        policy = make_engine(config, torch.bfloat16, device)
        engine.push(policy.engine_weights())
        engine.sample(prompts, 0)
        push, _ = timed(lambda: engine.push(policy.engine_weights()))
        sampling, samples = timed(engine.sample, prompts, 1)
        awake = torch.cuda.mem_get_info(device)[0]
        sleep, _ = timed(engine.sleep)
        freed = torch.cuda.mem_get_info(device)[0] - awake
        wake, _ = timed(lambda: engine.push(policy.engine_weights()))
        after = distance(engine.sample(prompts, 2))
        before = distance(samples)
        engine.close()
    return {
        "start_s": round(start, 2), "push_s": round(push, 3), "sleep_s": round(sleep, 3),
        "waking_push_s": round(wake, 3), "freed_gib": round(freed / 2**30, 2),
        "mismatch_rms": before, "mismatch_rms_after_sleep": after,
        "sampled_tokens_per_s": round(sum(len(sample.token_ids) for sample in samples) / sampling),
    }  # fmt: skip


def save_for_engine(model: Any, directory: Path) -> None:
    """Saves the weights, with a tokenizer of one word per token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(directory)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(model.config.vocab_size)}, unk_token="w0"))
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, eos_token="w2", pad_token="w2"
    )
    tokenizer.save_pretrained(directory)

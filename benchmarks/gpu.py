"""Correctness and speed of the learner's calculations on a GPU.

    python benchmarks/gpu.py [--device cuda] [--small]

Needs only torch, transformers and peft, and no files: models have the shapes of SmolLM2-135M and Qwen2.5-1.5B with
random weights, and responses consist of random tokens. For each shape:

- Check, in float32: log-probabilities and pooled features on the device against the model's own logits and hidden
  states on the CPU, one response at a time; then a PPO update on the device against the same update on the CPU.
- Speed, in the dtype that suits the device: the stages of an update without sampling, at the learner's defaults except
  for the micro-batch. Medians of three updates after a warm-up. Nothing is compiled.

On a GPU with vLLM, an engine is started too, to measure its start, how long a push of weights stops sampling, and how
far its log-probabilities are from the trainer's. `--device cpu --small` is a dry run of all but that. The exit status
is 1 if a check fails. Prints one JSON line last.
"""

import argparse
import copy
import gc
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import peft
import stand_ins  # noqa: F401 (before the learner's modules)
import torch
import transformers
from ppo import random_head
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from learner.improve.ppo.adam import Adam
from learner.improve.ppo.experience import judge_rollout, make_critic, to_experience
from learner.improve.ppo.update import UpdateStats, draw_minibatches, ppo_update
from learner.model.features import default_layers
from learner.model.forward import Tokens, run_trunk, token_logprobs
from learner.model.mismatch import mismatch
from learner.model.passes import policy_logprobs
from learner.model.policy import TrainablePolicy, lora
from learner.model.rollout import Rollout, SampledAnswer, to_rollout

SHAPES: dict[str, Any] = {
    "135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, rope_theta=10_000.0, initializer_range=1 / 24,
        tie_word_embeddings=True,
    ),
    "1.5B": Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=2048, rope_theta=1_000_000.0, initializer_range=0.02,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
SMALL = {"hidden_size": 144, "intermediate_size": 288, "num_hidden_layers": 3, "vocab_size": 2048}
# The number of tokens that all prompts share, and of each prompt's own tokens.
SHARED, OWN = 24, 16
RESPONSES, CHECKED = 32, 8
# Tokens per response and per micro-batch: 8, 32 and 8 answers with their prompts' own tokens.
CASES = [(64, 640), (64, 2560), (512, 4224)]
TEMPERATURE, TOKENS_AT_ONCE = 0.85, 2048
# The learner's defaults; a learning rate so small that no update stops early.
SETTINGS = SimpleNamespace(
    epochs=1, minibatches=2, micro_batch_tokens=TOKENS_AT_ONCE, learning_rate=1e-6, critic_learning_rate=1e-3,
    adam_epsilon=1e-5, max_grad_norm=1.0, gamma=1.0, gae_lambda=0.95, clip_range=0.2, dual_clip=3.0, value_clip=0.2,
    vf_coef=0.1, kl_coef=0.1, approx_kl_stop=0.02, importance_cap=2.0,
)  # fmt: skip
# The check uses a learning rate that moves the adapters, and two passes, so that the second has a KL.
CHECK_SETTINGS = SimpleNamespace(**{**vars(SETTINGS), "epochs": 2, "learning_rate": 2e-5, "approx_kl_stop": 1.0})
# Allowed differences between float32 on two devices: nats, the features' unit, and shares of the CPU's numbers.
LIMITS = {"logprobs": 1e-3, "ref_logprobs": 1e-3, "features": 1e-3, "statistics": 1e-2, "adapters": 2e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true", help="small models and short responses: a dry run")
    arguments = parser.parse_args()
    device: torch.device = arguments.device
    started = time.monotonic()
    machine = describe(device)
    say(f"{machine['name']}: {machine['dtype']}, {machine['reason']}")
    results, failed = {}, []
    for name, config in SHAPES.items():
        if arguments.small:
            config.update(SMALL)
        checked = check(config, device)
        failed += [f"{name} {what}" for what, limit in LIMITS.items() if not checked[what] <= limit]
        say(f"{name} float32, largest difference from the CPU: " + figures({what: checked[what] for what in LIMITS}))
        results[name] = {"check": checked, "cases": cases(name, config, device, machine["dtype"], arguments.small)}
    engine = try_engine(device)
    say(f"engine: {engine}")
    seconds = round(time.monotonic() - started, 1)
    say(f"{seconds} s in all; " + (f"WRONG: {', '.join(failed)}" if failed else "every check passed"))
    print(
        json.dumps({
            "benchmark": "gpu", "machine": machine, "small": arguments.small, "seconds": seconds, "failed": failed,
            "results": results, "engine": engine,
        })
    )  # fmt: skip
    sys.exit(bool(failed))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def figures(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {number:.3g}" for name, number in numbers.items())


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, and the dtype by the rule: bfloat16 from compute capability 8.0 on."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    if device.type != "cuda":
        return {"name": device.type, "dtype": "float32", "reason": "no GPU", "versions": versions}
    capability = torch.cuda.get_device_capability(device)
    return {
        "name": torch.cuda.get_device_name(device),
        "dtype": "bfloat16" if capability >= (8, 0) else "float32",
        "reason": f"compute capability {capability[0]}.{capability[1]}",
        "versions": {**versions, "cuda": torch.version.cuda},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


# Correctness


def check(config: Any, device: torch.device) -> dict[str, Any]:
    """The largest differences of the learner on `device` from the definition, or from the learner, on the CPU."""
    there = make_engine(config, torch.float32, device)
    here = TrainablePolicy(copy.deepcopy(there.model).to("cpu"), None)
    rollout = make_rollout([32 - 3 * row for row in range(CHECKED)], config.vocab_size)
    found = {**compare_passes(there, here, rollout, device), **compare_updates(there, here, rollout, device)}
    found["bfloat16_rms"] = bfloat16_rms(make_engine(config, torch.bfloat16, device), here, rollout, device)
    return found


def compare_passes(
    there: TrainablePolicy, here: TrainablePolicy, rollout: Rollout, device: torch.device
) -> dict[str, float]:
    """Compares in micro-batches whose rows share a prefix, and in micro-batches of one row."""
    layers = default_layers(here.model.config.num_hidden_layers)
    with here.reference() as reference:
        ref_logprobs, features = by_definition(reference, rollout, layers)
    logprobs, _ = by_definition(here.model, rollout, layers)
    sent = on_device(rollout, device)
    found: dict[str, list[Tensor]] = {"logprobs": [], "ref_logprobs": [], "features": []}
    for budget in (TOKENS_AT_ONCE, 1):
        judged = judge_rollout(there, head_for(there), sent, TEMPERATURE, budget)
        ours = policy_logprobs(there, sent.tokens, TEMPERATURE, budget)
        found["logprobs"].append(ours.cpu() - logprobs)
        found["ref_logprobs"].append(judged.ref_logprobs.cpu() - ref_logprobs)
        found["features"].append(judged.features - features)
    return {name: largest(differences) for name, differences in found.items()}


@torch.no_grad()
def by_definition(model: Any, rollout: Rollout, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(B, T) log-probabilities and (B, F) features by transformers' own full forward pass, one unpadded row at a time,
    without any code of the learner."""
    logprobs, features = torch.zeros(rollout.tokens.response_mask.shape), []
    for row, sample in enumerate(rollout.samples):
        output = model(input_ids=torch.tensor([sample.prompt + sample.token_ids]), output_hidden_states=True)
        first, count = len(sample.prompt), len(sample.token_ids)
        words = (output.logits[0, first - 1 : -1].float() / TEMPERATURE).log_softmax(dim=-1)
        logprobs[row, :count] = words[torch.arange(count), torch.tensor(sample.token_ids)]
        states = [output.hidden_states[layer][0, first:].mean(dim=0) for layer in layers]
        features.append(torch.cat([*states, torch.tensor([float(count)]).log()]))
    return logprobs, torch.stack(features)


def compare_updates(
    there: TrainablePolicy, here: TrainablePolicy, rollout: Rollout, device: torch.device
) -> dict[str, Any]:
    """Makes one update on each; differences are relative to the CPU's numbers and the adapters' largest change."""
    before = adapters(here)
    stats = {
        "cpu": asdict(update(here, rollout, CHECK_SETTINGS, {})),
        "device": asdict(update(there, on_device(rollout, device), CHECK_SETTINGS, {})),
    }
    compared = ("policy_loss", "value_loss", "approx_kl", "grad_norm", "optimizer_steps")
    ratios = torch.tensor([stats["device"][name] / stats["cpu"][name] for name in compared])
    moved = largest([adapters(here) - before])
    return {
        "statistics": largest([ratios - 1]),
        "adapters": largest([adapters(there) - adapters(here)]) / moved,
        "adapters_moved": moved,
        "update": stats,
    }


def bfloat16_rms(half: TrainablePolicy, here: TrainablePolicy, rollout: Rollout, device: torch.device) -> float:
    """Root mean square difference between bfloat16 on the device and float32 on the CPU with the same weights, in nats
    per token."""
    half.model.load_state_dict(here.model.state_dict())
    expected = policy_logprobs(here, rollout.tokens, TEMPERATURE, TOKENS_AT_ONCE)
    found = policy_logprobs(half, rollout.tokens.to(device), TEMPERATURE, TOKENS_AT_ONCE).cpu()
    return float((found - expected)[rollout.tokens.response_mask].square().mean().sqrt())


def adapters(policy: TrainablePolicy) -> Tensor:
    return torch.cat([parameter.detach().flatten().cpu() for parameter in policy.parameters])


def largest(differences: list[Tensor]) -> float:
    """The largest absolute difference; NaN if any is NaN, which exceeds every limit."""
    return float(torch.cat([difference.flatten() for difference in differences]).abs().max())


# Speed


def cases(name: str, config: Any, device: torch.device, dtype: str, small: bool) -> list[dict[str, Any]]:
    """Seconds of each stage, response tokens per second and peak device memory, for every case."""
    policy = make_engine(config, getattr(torch, dtype), device)
    found = []
    for length, budget in CASES:
        length = length // 8 if small else length
        settings = SimpleNamespace(**{**vars(SETTINGS), "micro_batch_tokens": budget})
        rollout = on_device(make_rollout([length] * RESPONSES, config.vocab_size), device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        runs: list[dict[str, float]] = []
        for _ in range(4):
            runs.append({})
            stats = update(policy, rollout, settings, runs[-1])
            assert stats.optimizer_steps == settings.epochs * settings.minibatches
        stages = {stage: round(median(run[stage] for run in runs[1:]), 4) for stage in runs[0]}
        seconds = median(sum(run.values()) for run in runs[1:])
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        case = {
            "responses": RESPONSES, "tokens": length, "micro_batch_tokens": budget, "dtype": dtype, "stages": stages,
            "seconds": round(seconds, 4), "response_tokens_per_s": round(RESPONSES * length / seconds),
            "first_seconds": round(sum(runs[0].values()), 4), "first_ratio_error": stats.first_ratio_error,
            "peak_gib": peak and round(peak, 2),
        }  # fmt: skip
        found.append(case)
        say(
            f"{name} {dtype}, {RESPONSES} x {length} tokens, micro-batch of {budget}: {seconds:.3f} s "
            f"({figures(stages)}), {case['response_tokens_per_s']} tokens/s, peak {case['peak_gib']} GiB"
        )
    return found


def update(policy: TrainablePolicy, rollout: Rollout, settings: Any, seconds: dict[str, float]) -> UpdateStats:
    """One update as in `learner.improve.ppo.trainer`, without sampling; fills in the seconds of each stage.

    There is no engine: the rollout's behavior_logprobs are its simulated distance from the policy."""
    device = rollout.tokens.input_ids.device
    reward_model = head_for(policy)
    critic = make_critic(reward_model).to(device)
    optimizer = Adam(
        [(policy.parameters, settings.learning_rate), (list(critic.parameters()), settings.critic_learning_rate)],
        settings.adam_epsilon,
    )

    def logprobs_of(part: Tokens) -> Tensor:
        hidden, _ = run_trunk(policy.model, part)
        return token_logprobs(policy.model, hidden, part, TEMPERATURE)

    passes = draw_minibatches(rollout.tokens, settings, torch.Generator().manual_seed(0))
    budget = settings.micro_batch_tokens
    with stage("reference", seconds, device):
        judged = judge_rollout(policy, reward_model, rollout, TEMPERATURE, budget, passes[0])
    with stage("policy", seconds, device):
        old_logprobs = policy_logprobs(policy, rollout.tokens, TEMPERATURE, budget, passes[0])
    with stage("experience", seconds, device):
        rollout = replace(rollout, behavior_logprobs=old_logprobs + rollout.behavior_logprobs)
        scores = reward_model.clipped(reward_model.scores(judged.features))
        batch = to_experience(rollout, judged, old_logprobs, scores, critic, settings.kl_coef, settings)
    with stage("training", seconds, device):
        return ppo_update(logprobs_of, critic, optimizer, batch, settings, passes, budget)


@contextmanager
def stage(name: str, seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    """Times the block until the device has finished its work."""
    wait(device)
    started = time.perf_counter()
    yield
    wait(device)
    seconds[name] = time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Test data


def make_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_engine(config: Any, dtype: torch.dtype, device: torch.device) -> TrainablePolicy:
    """A policy whose adapters already change the model, so that it differs from its reference."""
    model = lora(make_model(config, dtype, device), 16, 32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return TrainablePolicy(model, None)


def head_for(policy: TrainablePolicy) -> Any:
    config = policy.model.config
    return random_head(default_layers(config.num_hidden_layers), config.hidden_size)


def make_rollout(lengths: list[int], vocabulary: int) -> Rollout:
    """Responses of these lengths; their log-probabilities are noise of 0.1 nats (see `update`)."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    shared = draw(SHARED)
    return to_rollout([
        SampledAnswer(
            shared + draw(OWN + row % 4), draw(length), (0.1 * torch.randn(length, generator=generator)).tolist(), "",
            "length",
        )
        for row, length in enumerate(lengths)
    ])  # fmt: skip


def on_device(rollout: Rollout, device: torch.device) -> Rollout:
    return replace(rollout, tokens=rollout.tokens.to(device), behavior_logprobs=rollout.behavior_logprobs.to(device))


# The engine


def try_engine(device: torch.device) -> dict[str, float] | str:
    if device.type != "cuda":
        return "skipped: no GPU"
    if importlib.util.find_spec("vllm") is None:
        return "skipped: vLLM is not installed"
    return engine_figures(SHAPES["135M"], device)


def engine_figures(config: Any, device: torch.device) -> dict[str, float]:
    """The learner's engine in this process with the trainer: seconds of its start and of a push, during which it does
    not sample, sampled tokens per second, and the distance of its log-probabilities from the trainer's."""
    from learner.model.rollout import RolloutEngine
    from learner.settings import LearnerSettings
    from server.store.chats.records import Prompt

    def timed(call: Any, *arguments: Any) -> tuple[float, Any]:
        started = time.perf_counter()
        result = call(*arguments)
        wait(device)
        return time.perf_counter() - started, result

    prompts = [
        Prompt(str(row), sample.prompt, 64)
        for row, sample in enumerate(make_rollout([1] * RESPONSES, config.vocab_size).samples)
    ]
    settings = LearnerSettings(service_temperature=TEMPERATURE)
    with tempfile.TemporaryDirectory() as work:
        save_for_engine(make_model(config, torch.bfloat16, device), Path(work))
        start, engine = timed(RolloutEngine, Path(work), settings, 256)
        policy = make_engine(config, torch.bfloat16, device)
        engine.push(policy.engine_weights())
        engine.sample(prompts, 0)
        push, _ = timed(lambda: engine.push(policy.engine_weights()))
        sampling, samples = timed(engine.sample, prompts, 1)
        rollout = on_device(to_rollout(samples), device)
        logprobs = policy_logprobs(policy, rollout.tokens, TEMPERATURE, TOKENS_AT_ONCE)
        gap = mismatch(logprobs, rollout.behavior_logprobs, rollout.tokens.response_mask)
        engine.close()
    return {
        "start_s": round(start, 2),
        "push_s": round(push, 3),
        "sampled_tokens_per_s": round(int(rollout.tokens.response_mask.sum()) / sampling),
        "mismatch_rms": gap.rms,
    }


def save_for_engine(model: Any, directory: Path) -> None:
    """Saves the weights, with a tokenizer of one word per token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(directory)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(model.config.vocab_size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w2").save_pretrained(directory)


if __name__ == "__main__":
    main()

"""The page docs/benchmarks/gpu.md from what `gpu.py` measured."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

CHECKS = {
    "logprobs": "log-probabilities of the policy, nats",
    "ref_logprobs": "log-probabilities of the reference, nats",
    "features": "pooled features",
    "statistics": "losses, approx_kl, gradient norm: share of the CPU's",
    "adapters": "adapters after the update: share of their largest change",
    "bfloat16_rms": "bfloat16 on the GPU from float32 on the CPU, nats, root mean square",
}
HALVES = {
    "logprobs_rms": "log-probabilities, nats, root mean square",
    "statistics": "losses, approx_kl, gradient norm: share of the CPU's",
    "adapters": "adapters after the update: share of their largest change",
}
MEANS = {
    "policy_loss": "policy loss",
    "other_loss": "value loss",
    "approx_kl": "approx_kl",
    "grad_norm": "gradient norm",
}
STAGES = ("reference", "policy", "experience", "training")
ENGINE = {
    "start_s": "its start, s",
    "push_s": "a push of all weights, s",
    "sleep_s": "falling asleep, s",
    "waking_push_s": "a push that wakes it, s",
    "freed_gib": "memory that sleeping frees, GiB",
    "sampled_tokens_per_s": "tokens/s, 32 answers of up to 64 tokens",
    "mismatch_rms": "log-probabilities from the trainer's, nats, root mean square",
    "mismatch_rms_after_sleep": "the same after it slept",
}


def page(result: dict[str, Any]) -> str:
    """The page, from the script's last line."""

    def of(kind: str) -> list[dict[str, Any]]:
        return [part for part in result["parts"] if part["part"] == kind]

    [machine], [engine] = of("machine"), of("engine")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        ["# The learner's calculations on a GPU"],
        paragraph(
            f"`python benchmarks/gpu.py --write`, {result['date']}, one {machine['name']} ({machine['reason']}), "
            f"{versions}. One run of {result['seconds']:.0f} s. Models have random weights, two of them the shapes of "
            "SmolLM2-135M and Qwen2.5-1.5B; responses are random tokens. The dtype for this GPU is "
            f"{machine['dtype']}."
        ),
        ["## Correctness"],
        paragraph(
            "In float32, eight responses of 11 to 32 tokens, with adapters that already change the model. "
            "Log-probabilities and features are compared with the model's own logits and hidden states on the CPU, one "
            "response at a time; the update, four optimiser steps, is compared with the same update on the CPU. "
            "Largest differences:"
        ),
        table(of("float32"), CHECKS),
        means(of("float32")),
        ["In bfloat16 on both devices, whose kernels round differently:"],
        table(of("bfloat16"), HALVES),
        ["## Speed"],
        paragraph(
            f"In {machine['dtype']}, without torch.compile: an update of 32 responses, prompts of 40 to 43 tokens (24 "
            "of them shared), adapters of rank 16, one pass, two optimiser steps. Seconds are medians of three updates "
            "after one warm-up; the peak is `torch.cuda.max_memory_allocated` and includes the weights. Sampling is "
            "not included."
        ),
        speeds(of("speed")),
        ["## Engine"],
        *engine_parts(engine),
        paragraph("A whole round, real weights and other GPUs were not measured."),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def table(parts: list[dict[str, Any]], names: dict[str, str]) -> Iterator[str]:
    """A row for each name, a column for each shape."""
    yield "| | " + " | ".join(part["shape"] for part in parts) + " |"
    yield "|---|" + "---:|" * len(parts)
    for name, text in names.items():
        yield f"| {text} | " + " | ".join(f"{part[name]:.2g}" for part in parts) + " |"


def means(parts: list[dict[str, Any]]) -> Iterator[str]:
    """The update's means on both devices."""
    yield (
        "| the update's means | "
        + " | ".join(f"{part['shape']}, {name}" for part in parts for name in ("CPU", "GPU"))
        + " |"
    )
    yield "|---|" + "---:|" * (2 * len(parts))
    for name, text in MEANS.items():
        values = [part["update"][device][name] for part in parts for device in ("cpu", "device")]
        yield f"| {text} | " + " | ".join(f"{value:.6g}" for value in values) + " |"


def speeds(parts: list[dict[str, Any]]) -> Iterator[str]:
    yield f"| | response tokens | micro-batch, tokens | {' | '.join(STAGES)} | all | tokens/s | peak, GiB |"
    yield "|---|" + "---:|" * (len(STAGES) + 5)
    for part in parts:
        stages = " | ".join(f"{part['stages'][stage]:.3f}" for stage in STAGES)
        yield (
            f"| {part['shape']} | {part['tokens']} | {part['micro_batch_tokens']:,} | {stages} | "
            f"{part['seconds']:.3f} | {part['response_tokens_per_s']:,} | {part['peak_gib']} |"
        )


def engine_parts(engine: dict[str, Any]) -> Iterator[Iterable[str]]:
    if "skipped" in engine:
        yield [f"Not measured: {engine['skipped']}."]
        return
    yield ["The learner's engine, vLLM, in the process of the trainer, with the 135M model in bfloat16:"]
    yield ["| | |", "|---|---:|", *(f"| {text} | {engine[name]:,.3g} |" for name, text in ENGINE.items())]

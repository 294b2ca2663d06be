"""Correctness: the learner's calculations on a device against the same on the CPU, for `gpu.py`."""

import copy
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from gpu_update import (
    SETTINGS,
    TEMPERATURE,
    TOKENS_AT_ONCE,
    figures,
    head_for,
    judge_rollout,
    make_engine,
    make_rollout,
    say,
    update,
)
from torch import Tensor

from learner.model.features import default_layers
from learner.model.passes import policy_logprobs
from learner.model.policy import TrainablePolicy
from learner.model.rollout import Rollout

CHECKED = 8
# The check uses a learning rate that moves the adapters, and two passes, so that the second has a KL.
CHECK_SETTINGS = SimpleNamespace(**{**vars(SETTINGS), "epochs": 2, "learning_rate": 2e-5, "approx_kl_stop": 1.0})
# Allowed differences between float32 on two devices: nats, the features' unit, and shares of the CPU's numbers; and
# between bfloat16 on the device and float32 on the CPU, in nats.
LIMITS = {
    "logprobs": 1e-3, "ref_logprobs": 1e-3, "features": 1e-3, "statistics": 1e-2, "adapters": 2e-2,
    "bfloat16_rms": 0.15,
}  # fmt: skip


def check(config: Any, device: torch.device) -> dict[str, Any]:
    """The largest differences of the learner on `device` from the definition, or from the learner, on the CPU."""
    there = make_engine(config, torch.float32, device)
    here = on_cpu(there)
    rollout = checked_rollout(config)
    found = {**compare_passes(there, here, rollout, device), **compare_updates(there, here, rollout, device)}
    half = make_engine(config, torch.bfloat16, device)
    half.model.load_state_dict(here.model.state_dict())
    return {**found, "bfloat16_rms": root_mean_square(half, here, rollout, device)}


def judged(part: dict[str, Any]) -> dict[str, Any]:
    """The part with the names of the differences that are over their limit."""
    say(f"{part['shape']} float32, differences from the CPU: " + figures({what: part[what] for what in LIMITS}))
    return {**part, "failed": [what for what, limit in LIMITS.items() if not part[what] <= limit]}


def check_bfloat16(config: Any, device: torch.device) -> dict[str, Any]:
    """The same update in bfloat16 on both, with the same weights."""
    there = make_engine(config, torch.bfloat16, device)
    here, rollout = on_cpu(there), checked_rollout(config)
    found = {"logprobs_rms": root_mean_square(there, here, rollout, device)}
    found |= compare_updates(there, here, rollout, device)
    shown = {what: found[what] for what in ("logprobs_rms", "statistics", "adapters")}
    say(f"{config.num_hidden_layers} layers, bfloat16, differences from bfloat16 on the CPU: {figures(shown)}")
    return found


def on_cpu(policy: TrainablePolicy) -> TrainablePolicy:
    return TrainablePolicy(copy.deepcopy(policy.model).to("cpu"), None)


def checked_rollout(config: Any) -> Rollout:
    return make_rollout([32 - 3 * row for row in range(CHECKED)], config.vocab_size)


def compare_passes(
    there: TrainablePolicy, here: TrainablePolicy, rollout: Rollout, device: torch.device
) -> dict[str, float]:
    """Compares in micro-batches whose rows share a prefix, and in micro-batches of one row."""
    words, meaning = default_layers(here.model.config.num_hidden_layers)
    layers = words + meaning
    with here.reference() as reference:
        ref_logprobs, features = by_definition(reference, rollout, layers)
    logprobs, _ = by_definition(here.model, rollout, layers)
    sent = rollout.to(device)
    found: dict[str, list[Tensor]] = {"logprobs": [], "ref_logprobs": [], "features": []}
    for budget in (TOKENS_AT_ONCE, 1):
        judged = judge_rollout(there, head_for(there), sent, budget)
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
        "device": asdict(update(there, rollout.to(device), CHECK_SETTINGS, {})),
    }
    compared = ("policy_loss", "other_loss", "approx_kl", "grad_norm", "optimizer_steps")
    ratios = torch.tensor([stats["device"][name] / stats["cpu"][name] for name in compared])
    moved = largest([adapters(here) - before])
    return {
        "statistics": largest([ratios - 1]),
        "adapters": largest([adapters(there) - adapters(here)]) / moved,
        "adapters_moved": moved,
        "update": stats,
    }


def root_mean_square(there: TrainablePolicy, here: TrainablePolicy, rollout: Rollout, device: torch.device) -> float:
    """Root mean square difference between log-probabilities on the device and on the CPU, in nats per token."""
    expected = policy_logprobs(here, rollout.tokens, TEMPERATURE, TOKENS_AT_ONCE)
    found = policy_logprobs(there, rollout.tokens.to(device), TEMPERATURE, TOKENS_AT_ONCE).cpu()
    return float((found - expected)[rollout.tokens.response_mask].square().mean().sqrt())


def adapters(policy: TrainablePolicy) -> Tensor:
    return torch.cat([parameter.detach().flatten().cpu() for parameter in policy.parameters])


def largest(differences: list[Tensor]) -> float:
    """The largest absolute difference; NaN if any is NaN, which exceeds every limit."""
    return float(torch.cat([difference.flatten() for difference in differences]).abs().max())

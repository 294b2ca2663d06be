"""Passes over a rollout without gradients: the reference's, and the policy's own.

The reference's pass gives the log-probabilities for the KL and, from the same hidden states, the features for the
reward model and a critic: neither needs a separate pass.

Several workers each pass a share of the rows, and all get the results of all.

A pass runs on the device of its tokens, and its results per token stay there. The features of whole responses are on
the CPU, where the reward model is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from learner.model.features import FeatureSpec, pool
from learner.model.forward import (
    Tokens,
    answer_logprobs,
    micro_batches,
    prompt_states,
    response_states,
    shares_prefix,
    token_logprobs,
)
from learner.model.policy import TrainablePolicy


@dataclass(frozen=True)
class ReferencePass:
    """The reference's results for a rollout: ref_logprobs (B, T), pooled features (B, F) on the CPU, and the requested
    features of each prefix (B, T, P)."""

    ref_logprobs: Tensor
    features: Tensor
    prefix_features: Tensor


@torch.no_grad()
def reference_pass(
    policy: TrainablePolicy,
    tokens: Tokens,
    spec: FeatureSpec,
    temperature: float,
    budget: int,
    groups: list[Tensor] | None = None,
    prefix: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> ReferencePass:
    """The reference's pass, split by `micro_batches`. `prefix` turns the states of `spec`, (b, t, F) of the response
    and (b, F) of the prompt's last token, into (b, t, P); without it P is 0."""
    shape, device = tokens.response_mask.shape, tokens.response_mask.device
    ref_logprobs = torch.zeros(shape, device=device)
    features, prefix_features = torch.empty(0), torch.zeros(*shape, 0, device=device)

    def read(reference: nn.Module, part: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        hidden, layer_states = spec.states(reference, part)
        states = response_states(layer_states, part)
        of_prefixes = prefix(states, prompt_states(layer_states, part)) if prefix else states[:, :, :0]
        return token_logprobs(reference, hidden, part, temperature), pool(states, part.response_mask), of_prefixes

    parts = micro_batches(tokens, budget, groups, sharing=shares_prefix(policy.model))
    for rows, counts in policy.group.turns(parts):
        logprobs, pooled, of_prefixes = policy.run_reference(partial(read, part=tokens[rows]))
        columns = logprobs.shape[1]
        if not len(features):
            features = torch.zeros(len(tokens), pooled.shape[1], device=device)
            prefix_features = torch.zeros(*shape, of_prefixes.shape[2], device=device)
        if counts:
            ref_logprobs[rows, :columns] = logprobs
            features[rows] = pooled
            prefix_features[rows, :columns] = of_prefixes
    policy.group.add(ref_logprobs, features, prefix_features)
    return ReferencePass(ref_logprobs, features.cpu(), prefix_features)


@torch.no_grad()
def policy_logprobs(
    policy: TrainablePolicy, tokens: Tokens, temperature: float, budget: int, groups: list[Tensor] | None = None
) -> Tensor:
    """(B, T) log-probabilities of the sampled tokens under the current policy, split by `micro_batches`; zero for rows
    in no group."""
    logprobs = torch.zeros(tokens.response_mask.shape, device=tokens.response_mask.device)
    parts = micro_batches(tokens, budget, groups, sharing=shares_prefix(policy.model))
    for rows, counts in policy.group.turns(parts):
        found = policy.run(partial(answer_logprobs, tokens=tokens[rows], temperature=temperature))
        if counts:
            logprobs[rows, : found.shape[1]] = found
    policy.group.add(logprobs)
    return logprobs

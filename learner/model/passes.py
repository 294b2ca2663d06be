"""Passes over a rollout without gradients: the reference's, and the policy's own.

The reference's pass gives the log-probabilities for the KL and, from the same hidden states, the features for the
reward model and a critic: neither needs a separate pass.

A pass runs on the device of its tokens, and its results per token stay there. The features of whole responses are on
the CPU, where the reward model is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.model.features import FeatureSpec, pool
from learner.model.forward import (
    Tokens,
    micro_batches,
    prompt_states,
    response_states,
    run_trunk,
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
    with policy.reference() as reference:
        for rows in micro_batches(tokens, budget, groups, sharing=shares_prefix(reference)):
            part = tokens[rows]
            hidden, layer_states = spec.states(reference, part)
            columns = part.response_mask.shape[1]
            ref_logprobs[rows, :columns] = token_logprobs(reference, hidden, part, temperature)
            states = response_states(layer_states, part)
            pooled = pool(states, part.response_mask)
            if not len(features):
                features = torch.zeros(len(tokens), pooled.shape[1], device=device)
            features[rows] = pooled
            if prefix:
                of_prefixes = prefix(states, prompt_states(layer_states, part))
                if not prefix_features.shape[2]:
                    prefix_features = torch.zeros(*shape, of_prefixes.shape[2], device=device)
                prefix_features[rows, :columns] = of_prefixes
    return ReferencePass(ref_logprobs, features.cpu(), prefix_features)


@torch.no_grad()
def policy_logprobs(
    policy: TrainablePolicy, tokens: Tokens, temperature: float, budget: int, groups: list[Tensor] | None = None
) -> Tensor:
    """(B, T) log-probabilities of the sampled tokens under the current policy, split by `micro_batches`; zero for rows
    in no group."""
    logprobs = torch.zeros(tokens.response_mask.shape, device=tokens.response_mask.device)
    for rows in micro_batches(tokens, budget, groups, sharing=shares_prefix(policy.model)):
        part = tokens[rows]
        hidden, _ = run_trunk(policy.model, part)
        logprobs[rows, : part.response_mask.shape[1]] = token_logprobs(policy.model, hidden, part, temperature)
    return logprobs

"""Teacher-forced passes over sampled responses: log-probabilities and features, for any decoder-only model.

Sequences are prompt + response, padded on the right. A causal model never looks to the right, so padding needs no
attention mask and position ids are those of the unpadded row: the usual mistakes with left padding cannot happen.
Response token t of a row is at column `prompt_lengths + t` and is predicted one column before.

Letters: B responses, L columns, T response tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from learner.model.checkpointing import checkpointed
from learner.model.head import head_logits, trunk_of
from learner.model.sharding import sharded
from server.shared.model.merged import base_model
from server.shared.model.needs import logit_bytes

# Minimum number of shared tokens for which a separate pass pays off.
MIN_SHARED = 8
# A shared token takes 1 / this of the memory of a row's own token: only its keys and values, of all that a layer
# stores.
SHARED_COST = 10
# Maximum number of columns for eager attention on a CPU.
EAGER_COLUMNS = 256


@dataclass(frozen=True)
class Tokens:
    """Responses as a batch. `input_ids` (B, L), `prompt_lengths` (B,), `response_ids` and `response_mask` (B, T)."""

    input_ids: Tensor
    prompt_lengths: Tensor
    response_ids: Tensor
    response_mask: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: Tensor) -> "Tokens":
        """The given rows, without columns that none of them needs."""
        lengths = self.response_mask[rows].sum(dim=1)
        t, columns = int(lengths.max()), int((self.prompt_lengths[rows] + lengths).max())
        return Tokens(
            self.input_ids[rows, :columns],
            self.prompt_lengths[rows],
            self.response_ids[rows, :t],
            self.response_mask[rows, :t],
        )

    def to(self, device: torch.device) -> "Tokens":
        """The same batch on `device`; every pass over it computes there."""
        return Tokens(
            self.input_ids.to(device),
            self.prompt_lengths.to(device),
            self.response_ids.to(device),
            self.response_mask.to(device),
        )


def to_tokens(prompts: list[list[int]], responses: list[list[int]]) -> Tokens:
    """Pads to a batch. The pad id is 0 and has no meaning: the mask comes from lengths, so EOS may equal any pad id."""
    columns = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    width = max(len(r) for r in responses)
    input_ids = torch.zeros(len(prompts), columns, dtype=torch.long)
    response_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    response_mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        response_ids[row, : len(response)] = torch.tensor(response)
        response_mask[row, : len(response)] = True
    return Tokens(input_ids, torch.tensor([len(p) for p in prompts]), response_ids, response_mask)


def micro_batches(tokens: Tokens, budget: int, groups: list[Tensor] | None = None, *, sharing: bool) -> list[Tensor]:
    """Row indices in micro-batches of similar length, to keep padding small: each has at most `budget` tokens, or one
    row, which may be longer. Padding counts.

    `sharing`: whether the model's passes compute a common prefix once (`shares_prefix`). Then a shared token counts a
    tenth, since its keys and values are copied to every row. The prefix itself is beside the budget.

    With `groups` of rows, only those rows are used, and no micro-batch has rows of two groups."""
    if groups is not None:
        return [group[rows] for group in groups for rows in micro_batches(tokens[group], budget, sharing=sharing)]
    shared = shared_prefix(tokens) if sharing else 0
    shared = shared if shared >= MIN_SHARED else 0
    lengths = tokens.prompt_lengths + tokens.response_mask.sum(dim=1) - shared
    order = torch.argsort(lengths, stable=True)
    batches: list[list[int]] = [[]]
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if batches[-1] and (len(batches[-1]) + 1) * (length + shared // SHARED_COST) > budget:
            batches.append([])
        batches[-1].append(row)
    return [torch.tensor(batch, device=order.device) for batch in batches]


def run_trunk(model: nn.Module, tokens: Tokens, layers: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
    """Last hidden states (B, L, D), and those of `layers` (indices into transformers' `hidden_states`).

    The prefix that all rows share (at least the template's system message) is computed once, with its gradient."""
    base = base_model(model)
    trunk = trunk_of(base)
    choose_attention(trunk, tokens)
    shared, rows, ids = shared_prefix(tokens), len(tokens), tokens.input_ids
    if shared < MIN_SHARED or not shares_prefix(base):
        output = trunk(input_ids=ids, use_cache=False, output_hidden_states=bool(layers))
        return output.last_hidden_state, [output.hidden_states[layer] for layer in layers]
    prefix = trunk(input_ids=ids[:1, :shared], use_cache=True, output_hidden_states=bool(layers))
    prefix.past_key_values.batch_repeat_interleave(rows)
    output = trunk(input_ids=ids[:, shared:], past_key_values=prefix.past_key_values, output_hidden_states=bool(layers))

    def whole(start: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([start.expand(rows, -1, -1), rest], dim=1)

    states = [whole(prefix.hidden_states[layer], output.hidden_states[layer]) for layer in layers]
    return whole(prefix.last_hidden_state, output.last_hidden_state), states


def shares_prefix(model: nn.Module) -> bool:
    """Whether a model's passes compute the prefix that all rows share once. What it remembers of a prefix must fit
    several rows: keys and values do, the states of recurrent layers do not. Checkpointed layers remember nothing, and
    sharded ones would be gathered twice: by workers whose rows share a prefix, while others wait for them once."""
    base = base_model(model)
    layers = DynamicCache(config=base.config).layers
    repeats = not base._is_stateful and all(hasattr(layer, "batch_repeat_interleave") for layer in layers)
    return repeats and not checkpointed(base) and not sharded(base)


def shared_prefix(tokens: Tokens) -> int:
    """How many tokens all prompts begin with; 0 for a single row, which shares nothing."""
    if len(tokens) == 1:
        return 0
    differs = (tokens.input_ids != tokens.input_ids[:1]).any(dim=0)
    shortest = int(tokens.prompt_lengths.min())
    return int(differs[:shortest].int().argmax()) if differs[:shortest].any() else shortest


def answer_logprobs(model: nn.Module, tokens: Tokens, temperature: float) -> Tensor:
    """(B, T) log pi of the sampled tokens at the sampling temperature, in fp32; zero where masked."""
    hidden, _ = run_trunk(model, tokens)
    return token_logprobs(model, hidden, tokens, temperature)


def token_logprobs(model: nn.Module, hidden: Tensor, tokens: Tokens, temperature: float) -> Tensor:
    """`answer_logprobs`, given the last hidden states (B, L, D).

    Logits are computed only where a response token needs them, at most `logit_bytes` at once: if there are more, the
    backward pass computes them again, piece by piece."""
    rows, steps = tokens.response_mask.nonzero(as_tuple=True)
    predicting = hidden[rows, tokens.prompt_lengths[rows] + steps - 1]
    sampled = _chosen_logprobs(model, predicting, tokens.response_ids[rows, steps], temperature)
    return torch.zeros_like(tokens.response_mask, dtype=torch.float32).index_put((rows, steps), sampled)


def _chosen_logprobs(model: nn.Module, hidden: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """(N,) log-probabilities of the words `chosen` (N,) after the last hidden states (N, D)."""

    def logprobs(states: Tensor, words: Tensor) -> Tensor:
        return -cross_entropy(head_logits(model, states).div_(temperature), words, reduction="none")

    of_a_word = 4 * base_model(model).config.get_text_config().vocab_size
    most = max(1, logit_bytes(checkpointed(model)) // of_a_word)
    if len(chosen) <= most:
        return logprobs(hidden, chosen)
    pieces = zip(hidden.split(most), chosen.split(most), strict=True)
    return torch.cat([checkpoint(logprobs, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces])


def choose_attention(trunk: Any, tokens: Tokens) -> None:
    """Chooses eager attention for short rows on a CPU, otherwise PyTorch's fused attention. That needs no L x L matrix,
    but up to a few hundred columns its backward pass takes twice as long (docs/decisions/0009). It knows neither caps
    (Gemma 2) nor sinks (gpt-oss): those families are eager at any length."""
    short = tokens.input_ids.device.type == "cpu" and tokens.input_ids.shape[1] <= EAGER_COLUMNS
    fused = trunk._supports_sdpa and not getattr(trunk.config, "attn_logit_softcapping", None)
    wanted = "sdpa" if fused and not short else "eager"
    if trunk.config._attn_implementation != wanted:
        trunk.set_attn_implementation(wanted)


def prompt_states(states: list[Tensor], tokens: Tokens) -> Tensor:
    """(B, len(states) * D) fp32 hidden states of each prompt's last token."""
    rows = torch.arange(len(tokens), device=tokens.prompt_lengths.device)
    return torch.cat([state[rows, tokens.prompt_lengths - 1] for state in states], dim=1).float()


def response_states(states: list[Tensor], tokens: Tokens) -> Tensor:
    """(B, T, len(states) * D) fp32 hidden states of the response's own tokens; zero where masked."""
    rows, steps = tokens.response_mask.nonzero(as_tuple=True)
    taken = torch.cat([state[rows, tokens.prompt_lengths[rows] + steps] for state in states], dim=1).float()
    result = taken.new_zeros(*tokens.response_mask.shape, taken.shape[1])
    result[rows, steps] = taken
    return result

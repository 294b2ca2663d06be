"""What a linear head sees of an answer: frozen reference states, averaged over the answer's tokens, and its length.

A linear head on a mean over tokens is a mean of per-token scores, so the same head gives an answer's score and, on the
tokens so far, a value. Features are cached on disk by reference, version of this file's recipe, layers and tokens.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from learner.forward import Tokens, micro_batches, response_states, run_trunk, to_tokens

RECIPE = 1
TokenPair = tuple[list[int], list[int]]


def default_layers(hidden_layers: int) -> tuple[int, ...]:
    """Five indices into transformers' `hidden_states`, evenly spaced, the last layer among them."""
    return tuple(sorted({max(1, round(hidden_layers * k / 5)) for k in range(1, 6)}))


def pool(states: Tensor, response_mask: Tensor) -> Tensor:
    """(B, F + 1): the mean of states (B, T, F) over the response's tokens, then log length. States are zero where
    masked."""
    lengths = response_mask.sum(dim=1, keepdim=True).to(states.dtype)
    return torch.cat([states.sum(dim=1) / lengths, lengths.log()], dim=1)


def pool_prefixes(states: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, F) means of states over the tokens before each position, zero before the first, and their number (T,)."""
    counts = torch.arange(states.shape[1], dtype=states.dtype, device=states.device)
    before = states.cumsum(dim=1) - states
    return before / counts.clamp(min=1)[None, :, None], counts


class FeatureCache:
    """Pooled features by token ids, one safetensors file per reference and recipe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Tensor] = load_file(path) if path.exists() else {}

    @classmethod
    def open(cls, directory: Path, reference_sha256: str, layers: tuple[int, ...]) -> "FeatureCache":
        name = hashlib.sha256(f"{reference_sha256} {RECIPE} {layers}".encode()).hexdigest()[:16]
        return cls(directory / f"features-{name}.safetensors")

    def get(
        self,
        pairs: list[TokenPair],
        model: nn.Module,
        layers: tuple[int, ...],
        micro_batch: int,
        advance: Callable[[int], None],
    ) -> Tensor:
        """(N, F + 1) of each (prompt, response); what is missing is computed with the reference `model` and kept."""
        keys = [_key(pair) for pair in pairs]
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._known}
        advance(sum(key not in missing for key in keys))
        if missing:
            tokens = to_tokens([pair[0] for pair in missing.values()], [pair[1] for pair in missing.values()])
            features = extract(model, tokens, layers, micro_batch, advance)
            self._known.update(zip(missing, features.unbind(), strict=True))
            self._save()
        return torch.stack([self._known[key] for key in keys])

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        staging = self._path.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in self._known.items()}, staging)
        staging.rename(self._path)


def extract(
    model: nn.Module, tokens: Tokens, layers: tuple[int, ...], micro_batch: int, advance: Callable[[int], None]
) -> Tensor:
    """(B, F + 1) pooled features of every response, on the CPU."""
    rows_done: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode():
        for rows in micro_batches(tokens, micro_batch):
            part = tokens[rows]
            _, states = run_trunk(model, part, layers)
            rows_done.append((rows, pool(response_states(states, part), part.response_mask).cpu()))
            advance(len(rows))
    result = torch.empty(len(tokens), rows_done[0][1].shape[1])
    for rows, features in rows_done:
        result[rows.cpu()] = features
    return result


def _key(pair: TokenPair) -> str:
    prompt, response = pair
    return hashlib.sha256(f"{prompt}|{response}".encode()).hexdigest()[:32]

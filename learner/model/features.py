"""Features of an answer for a linear head: frozen reference states, averaged over the answer's tokens, and its length.

A linear head on a mean over tokens is a mean of per-token scores, so the same head gives an answer's score and, on the
tokens so far, a value. Features are cached on disk by reference, version of this file's recipe, layers, dtype and
tokens.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from sqlite_utils import Database
from sqlite_utils.utils import chunks
from torch import Tensor, nn

from learner.model.forward import Tokens, micro_batches, response_states, run_trunk, shares_prefix, to_tokens
from server.shared.model.dtype import DtypeName

RECIPE = 1
# Answers computed between two writes to the cache.
CHUNK = 256
TokenPair = tuple[list[int], list[int]]


def default_layers(hidden_layers: int) -> tuple[int, ...]:
    """Five indices into transformers' `hidden_states`, evenly spaced, including the last layer."""
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
    """Pooled features by token ids, in one SQLite file per reference and recipe. A round reads the rows it needs and
    computes the missing ones; what a killed round computed is kept."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = Database(str(path))
        self._db.enable_wal()
        self._rows = self._db.table("features", pk="key")
        self._rows.create({"key": str, "value": bytes}, if_not_exists=True)

    @classmethod
    def open(cls, directory: Path, reference_sha256: str, layers: tuple[int, ...], dtype: DtypeName) -> "FeatureCache":
        name = hashlib.sha256(f"{reference_sha256} {RECIPE} {layers} {dtype}".encode()).hexdigest()[:16]
        return cls(directory / f"features-{name}.db")

    def get(
        self,
        pairs: list[TokenPair],
        model: nn.Module,
        layers: tuple[int, ...],
        budget: int,
        advance: Callable[[int], None],
    ) -> Tensor:
        """Features (N, F + 1) of each (prompt, response). Missing ones are computed with the reference `model` and
        stored."""
        keys = [_key(pair) for pair in pairs]
        known = self._read(keys)
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
        advance(sum(key in known for key in keys))
        for chunk in map(list, chunks(missing, CHUNK)):
            tokens = to_tokens([missing[key][0] for key in chunk], [missing[key][1] for key in chunk])
            fresh = dict(zip(chunk, extract(model, tokens, layers, budget, advance), strict=True))
            self._rows.insert_all({"key": key, "value": row.numpy().tobytes()} for key, row in fresh.items())
            known.update(fresh)
        return torch.stack([known[key] for key in keys])

    def close(self) -> None:
        self._db.close()

    def _read(self, keys: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for chunk in map(list, chunks(dict.fromkeys(keys), CHUNK)):
            marks = ", ".join("?" * len(chunk))
            for row in self._rows.rows_where(f"key IN ({marks})", chunk):
                found[row["key"]] = torch.frombuffer(bytearray(row["value"]), dtype=torch.float32)
        return found


def extract(
    model: nn.Module, tokens: Tokens, layers: tuple[int, ...], budget: int, advance: Callable[[int], None]
) -> Tensor:
    """(B, F + 1) pooled features of every response, on the CPU."""
    rows_done: list[tuple[Tensor, Tensor]] = []
    tokens = tokens.to(next(model.parameters()).device)
    with torch.inference_mode():
        for rows in micro_batches(tokens, budget, sharing=shares_prefix(model)):
            part = tokens[rows]
            _, states = run_trunk(model, part, layers)
            rows_done.append((rows.cpu(), pool(response_states(states, part), part.response_mask).cpu()))
            advance(len(rows))
    result = torch.empty(len(tokens), rows_done[0][1].shape[1])
    for rows, features in rows_done:
        result[rows] = features
    return result


def _key(pair: TokenPair) -> str:
    prompt, response = pair
    return hashlib.sha256(f"{prompt}|{response}".encode()).hexdigest()[:32]

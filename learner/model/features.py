"""Features of an answer for a linear head: frozen reference states and the surface of its tokens, averaged over the
tokens, and its length.

A linear head on a mean over tokens is a mean of per-token scores, so the same head gives an answer's score and, on the
tokens so far, a value. Features are cached on disk by reference, version of this file's recipe, layers, dtype and
tokens.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sqlite_utils import Database
from sqlite_utils.utils import chunks
from torch import Tensor, nn

from learner.model.forward import Tokens, micro_batches, response_states, run_trunk, shares_prefix, to_tokens
from learner.model.surface import surface_table
from server.shared.model.dtype import DtypeName
from server.shared.model.text import ChatText

RECIPE = 2
# Answers computed between two writes to the cache.
CHUNK = 256
TokenPair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class FeatureSpec:
    """What features are made of, in this order: hidden states of early layers, which keep which words were used, and of
    later ones, which know what is meant (indices into transformers' `hidden_states`); and counts of each token's
    surface, (V, S), by default none. The log of an answer's length comes last."""

    words: tuple[int, ...] = ()
    meaning: tuple[int, ...] = ()
    surface: Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.uint8))

    def sizes(self, features: int) -> tuple[int, int, int]:
        """The columns of each of the three, if there are so many features."""
        counts = self.surface.shape[1]
        layer = (features - 1 - counts) // max(1, len(self.words) + len(self.meaning))
        return len(self.words) * layer, len(self.meaning) * layer, counts

    def states(self, model: nn.Module, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """Last hidden states (B, L, D) of `tokens`, and what features are made of, each (B, L, its own size)."""
        hidden, states = run_trunk(model, tokens, self.words + self.meaning)
        # A model may have more embeddings than its tokenizer has tokens.
        ids = tokens.input_ids.clamp(max=len(self.surface) - 1)
        return hidden, [*states, self.surface.to(ids.device)[ids].to(hidden.dtype)]


def feature_spec(model: Any, text: ChatText, layers: tuple[int, ...] = ()) -> FeatureSpec:
    """The spec for a transformers model and its text, with these `layers` for what is meant, if any are given."""
    words, meaning = ((), layers) if layers else default_layers(model.config.get_text_config().num_hidden_layers)
    return FeatureSpec(words, meaning, surface_table(text.pieces(), text.end_token_id))


def default_layers(hidden_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices into transformers' `hidden_states`, for words and for meaning: the embeddings and three early layers, and
    three at two, four and five fifths (docs/decisions/0039-small-data.md)."""
    meaning = sorted({max(1, round(hidden_layers * fifths / 5)) for fifths in (2, 4, 5)})
    early = {0, *(max(least, round(hidden_layers * least / 30)) for least in (1, 2, 4))}
    return tuple(layer for layer in sorted(early) if layer < meaning[0]), tuple(meaning)


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
    def open(cls, directory: Path, reference_sha256: str, spec: FeatureSpec, dtype: DtypeName) -> "FeatureCache":
        recipe = f"{reference_sha256} {RECIPE} {spec.words} {spec.meaning} {spec.surface.shape[1]} {dtype}"
        name = hashlib.sha256(recipe.encode()).hexdigest()[:16]
        return cls(directory / f"features-{name}.db")

    def get(
        self,
        pairs: list[TokenPair],
        model: nn.Module,
        spec: FeatureSpec,
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
            fresh = dict(zip(chunk, extract(model, tokens, spec, budget, advance), strict=True))
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


def extract(model: nn.Module, tokens: Tokens, spec: FeatureSpec, budget: int, advance: Callable[[int], None]) -> Tensor:
    """(B, F + 1) pooled features of every response, on the CPU."""
    rows_done: list[tuple[Tensor, Tensor]] = []
    tokens = tokens.to(next(model.parameters()).device)
    with torch.inference_mode():
        for rows in micro_batches(tokens, budget, sharing=shares_prefix(model)):
            part = tokens[rows]
            _, states = spec.states(model, part)
            rows_done.append((rows.cpu(), pool(response_states(states, part), part.response_mask).cpu()))
            advance(len(rows))
    result = torch.empty(len(tokens), rows_done[0][1].shape[1])
    for rows, features in rows_done:
        result[rows] = features
    return result


def _key(pair: TokenPair) -> str:
    prompt, response = pair
    return hashlib.sha256(f"{prompt}|{response}".encode()).hexdigest()[:32]

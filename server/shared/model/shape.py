"""The matrices of a model, which determine its memory, disk space and speed. Read from headers, never from weights."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from server.shared.errors import ManifestError

Matrix = tuple[int, int]

# A layer's number in a tensor's name, and that of an expert in a layer.
LAYER, EXPERT = re.compile(r"\.(\d+)\."), re.compile(r"\.experts\.(\d+)\.")
# The names that families give, in their configuration, to the number of experts that a token is sent to.
CHOSEN_EXPERTS = ("num_experts_per_tok", "moe_k", "moe_top_k", "experts_per_token")


@dataclass(frozen=True)
class ModelShape:
    """`matrices`: how many there are of each shape (outputs, inputs), without `head`, which computes the logits.

    `layers` is their number, and `outputs` how many numbers all their matrices give for a token; of a mixture, only
    those of the experts that it is sent to count."""

    parameters: int
    head: Matrix
    matrices: Mapping[Matrix, int]
    layers: int
    outputs: int


def read_shape(directory: Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory. Raises ManifestError if no header can be read."""
    return shape_of(tensor_shapes(directory), chosen_experts(directory))


def shape_of(tensors: Mapping[str, list[int]], experts: int | None = None) -> ModelShape:
    """The shape from a checkpoint's tensors. Embedding and head have the most rows, one per word. `experts`: how many
    a token is sent to; None: all."""
    plain = {name: (shape[0], shape[1]) for name, shape in tensors.items() if len(shape) == 2}
    head = max(plain.values())
    matrices = {name: matrix for name, matrix in plain.items() if matrix[0] != head[0]}
    layered = {name: matrix[0] for name, matrix in matrices.items() if LAYER.search(name)}
    of_experts = sum(rows for name, rows in layered.items() if EXPERT.search(name))
    number = len({found[1] for name in layered if (found := EXPERT.search(name))})
    share = min(1.0, (experts or number) / number) if number else 1.0
    # Some checkpoints have the experts of a layer as one tensor: (experts, outputs, inputs).
    joined = [shape for name, shape in tensors.items() if len(shape) == 3 and LAYER.search(name) and shape[1] > 1]
    return ModelShape(
        parameters=sum(math.prod(shape) for shape in tensors.values()),
        head=head,
        matrices=Counter(matrices.values()),
        layers=len({found[1] for name in layered if (found := LAYER.search(name))}),
        outputs=sum(layered.values())
        - of_experts
        + round(of_experts * share)
        + sum(min(experts or shape[0], shape[0]) * shape[1] for shape in joined),
    )


def chosen_experts(directory: Path) -> int | None:
    """How many experts a token is sent to, by the configuration in `directory`; None if it does not say."""
    path = directory / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for table in (values, values.get("text_config") or {}):
        for name in CHOSEN_EXPERTS:
            if isinstance(number := table.get(name), int):
                return number
    return None


def tensor_shapes(directory: Path) -> dict[str, list[int]]:
    """The shape of every tensor in `directory` by name, from the files' headers. Raises ManifestError."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ManifestError(f"{directory.name}/{path.name} is not a valid safetensors file ({error}).") from error
    if not shapes:
        raise ManifestError(f"{directory.name} has no weights (*.safetensors).")
    return shapes

"""The model to serve: whether it can be, and its shape."""

import os
from dataclasses import dataclass
from pathlib import Path

from server.reference.model_checks import check_family, check_model
from server.reference.model_files import read_headers
from server.reference.model_hub import cached
from server.reference.reference import about, check_same_model, check_trust, find_model
from server.settings import DEFAULT_MODEL
from server.shared.errors import DataDirectoryError, ManifestError
from server.shared.model.dtype import DtypeName
from server.shared.model.shape import ModelShape, chosen_experts, read_shape, shape_of
from server.store.files.manifest import read_manifest
from server.store.learning.policies import FIRST_REFERENCE
from server.store.store import Store


@dataclass(frozen=True)
class Model:
    """`problem`: why it cannot be served, as a sentence. `shape` is None if no header has it."""

    shape: ModelShape | None = None
    problem: str = ""
    fetched: bool = True


# The shape of the packaged default, whose file takes seconds to read.
SMOLLM2 = ModelShape(
    134_515_008, (49_152, 576), {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30}, 30, 155_520
)  # fmt: skip


def read_model(data_dir: Path, model: str, trust_remote_code: bool = False, dtype: DtypeName = "bfloat16") -> Model:
    """The reference that a server here starts with, or the files that it would be created from, checked as `server
    serve` does except for the values of weights."""
    reference = data_dir / "policies" / (Store.peek_origin(data_dir) or FIRST_REFERENCE)
    try:
        if reference.exists():
            check_same_model(reference, model, read_manifest)
            check_trust(reference, trust_remote_code)
            with about(model):
                check_family(reference, dtype)
            return Model(read_shape(reference))
        source, _ = find_model(model)
        if model == DEFAULT_MODEL:
            return Model(SMOLLM2)
        with about(model):
            directory = Path(source) if os.path.isabs(source) else cached(source)
            if directory is None:
                return Model(fetched=False)
            check_model(directory, {}, trust_remote_code, dtype, name="" if os.path.isabs(source) else source)
            shapes = {name: shape for name, (_, shape) in read_headers(directory).items()}
        return Model(shape_of(shapes, chosen_experts(directory)) if shapes else None)
    except (DataDirectoryError, ManifestError) as error:
        return Model(problem=str(error))

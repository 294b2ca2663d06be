"""Weights of a version for an engine: merged in the engine's dtype, and stored separately per dtype."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.improve_settings import PolicySettings
from learner.model.policy import TrainablePolicy, published_weights
from server.engine.weights import adapter_weights, engine_weights
from server.shared.errors import ManifestError
from server.shared.model.dtype import DtypeName
from server.store.files.manifest import new_version
from tests.learner.conftest import save_tiny_model
from tests.learner.rounds import make_reference, make_version

WEIGHT = "model.layers.0.mlp.up_proj.weight"


def make_adapter(data_dir: Path) -> None:
    """v0001: an adapter on the reference that changes it."""
    policy = TrainablePolicy.create(
        data_dir / "policies" / "v0000", PolicySettings(), torch.float32, torch.device("cpu")
    )
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.01)
    final = data_dir / "policies" / "v0001"
    with new_version(final, kind="adapter", reference_version="v0000") as staging:
        policy.save(staging)


def weight(data_dir: Path, dtype: DtypeName) -> tuple[str, torch.Tensor]:
    directory = engine_weights(data_dir, "v0001", dtype)
    return str(directory.relative_to(data_dir)), load_file(directory / "model.safetensors")[WEIGHT]


def test_an_adapter_is_merged_in_the_engines_dtype(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    make_reference(tmp_path, tmp_path / "model")
    make_adapter(tmp_path)
    # As written by the first releases: in bfloat16, directly in the folder that now has a folder per dtype.
    old = tmp_path / "merged" / "v0001"
    shutil.copytree(tmp_path / "policies" / "v0000", old)

    where, exact = weight(tmp_path, "float32")
    assert (where, exact.dtype) == ("merged/float32/v0001", torch.float32)
    where, rounded = weight(tmp_path, "bfloat16")
    assert (where, rounded.dtype) == ("merged/bfloat16/v0001", torch.bfloat16)
    assert not torch.equal(exact, rounded.float())
    assert not old.exists()
    # The served weights are those that the learner judged, even if the reference's files have another dtype.
    policies = tmp_path / "policies"
    for dtype, served in ((torch.float32, exact), (torch.bfloat16, rounded)):
        judged = dict(published_weights(policies / "v0001", policies / "v0000", dtype))
        assert torch.equal(judged[WEIGHT], served)

    # Creating one does not recreate the other.
    made = (tmp_path / "merged" / "float32" / "v0001" / "model.safetensors").stat().st_mtime_ns
    engine_weights(tmp_path, "v0001", "bfloat16")
    engine_weights(tmp_path, "v0001", "float32")
    assert (tmp_path / "merged" / "float32" / "v0001" / "model.safetensors").stat().st_mtime_ns == made


def test_adapters_and_references_are_served_as_they_are(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    make_reference(tmp_path, tmp_path / "model")
    make_adapter(tmp_path)
    policies = tmp_path / "policies"
    assert [adapter_weights(tmp_path, version) for version in ("v0000", "v0001")] == [
        policies / "v0000", policies / "v0001",
    ]  # fmt: skip
    make_version(tmp_path, "v0002")
    with pytest.raises(ManifestError, match="v0002 has full weights, but this server serves adapters"):
        adapter_weights(tmp_path, "v0002")

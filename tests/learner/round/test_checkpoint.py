"""Publishing: whole or not at all, never changed, and loadable by itself."""

from pathlib import Path

import pytest

from learner.round.checkpoint import copy_weights, publish_version, verified, with_tokenizer
from server.shared.errors import ManifestError


def make(final: Path, text: str = "{}") -> None:
    def fill(staging: Path) -> None:
        (staging / "adapter_config.json").write_text(text)

    publish_version(final, fill, kind="adapter", reference_version="v0000", info={})


def test_published_and_verified(tmp_path: Path) -> None:
    make(tmp_path / "v0001")
    directory, manifest = verified(tmp_path / "v0001")
    assert (directory.name, manifest.kind, manifest.base_version) == ("v0001", "adapter", "v0000")


def test_a_version_never_changes(tmp_path: Path) -> None:
    make(tmp_path / "v0001", "first")
    make(tmp_path / "v0001", "second")
    assert (tmp_path / "v0001" / "adapter_config.json").read_text() == "first"


def test_a_fill_that_fails_leaves_no_version(tmp_path: Path) -> None:
    def fill(staging: Path) -> None:
        (staging / "half").write_text("x")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish_version(tmp_path / "v0001", fill, kind="adapter", reference_version="v0000", info={})
    assert not (tmp_path / "v0001").exists()
    make(tmp_path / "v0001")
    assert not (tmp_path / "v0001" / "half").exists()


def test_a_changed_version_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "v0001")
    (tmp_path / "v0001" / "adapter_config.json").write_text("{ }")
    with pytest.raises(ManifestError):
        verified(tmp_path / "v0001")
    with pytest.raises(ManifestError, match="v0002 has no directory"):
        verified(tmp_path / "v0002")


def test_a_full_version_takes_the_tokenizer_along(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "model.safetensors").write_text("weights")
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "tokenizer.json").write_text("words")
    (tmp_path / "reference" / "model.safetensors").write_text("old weights")
    (tmp_path / "v0001").mkdir()
    with_tokenizer(copy_weights(tmp_path / "step"), tmp_path / "reference")(tmp_path / "v0001")
    found = {path.name: path.read_text() for path in (tmp_path / "v0001").iterdir()}
    assert found == {"model.safetensors": "weights", "tokenizer.json": "words"}


def test_a_candidate_that_is_gone_is_not_published_as_an_empty_version(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="step0003 has no weights to publish"):
        publish_version(
            tmp_path / "v0001", copy_weights(tmp_path / "step0003"), kind="adapter", reference_version="v0000", info={}
        )
    assert not (tmp_path / "v0001").exists()

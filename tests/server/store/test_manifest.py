"""Published versions: whole or absent, verified file by file."""

from pathlib import Path

import pytest

from server.shared.errors import ManifestError
from server.store.files.manifest import new_staging, publish, verify, write_manifest
from tests.server.conftest import publish_version


def test_a_published_version_verifies(tmp_path: Path) -> None:
    manifest = verify(publish_version(tmp_path, "v0003"))
    assert (manifest.version, manifest.kind, manifest.reference_version) == ("v0003", "full", "v0000")
    assert list(manifest.files) == ["model.safetensors"]
    assert [path.name for path in (tmp_path / "policies").iterdir()] == ["v0003"]


def test_a_version_under_another_name_is_refused(tmp_path: Path) -> None:
    directory = publish_version(tmp_path, "v0003")
    with pytest.raises(ManifestError, match="v0004 holds the manifest of v0003"):
        verify(directory.rename(tmp_path / "policies" / "v0004"))


def test_a_pickle_is_refused_even_if_listed(tmp_path: Path) -> None:
    directory = publish_version(tmp_path, "v0003")
    (directory / "optimizer.pt").write_bytes(b"")
    write_manifest(directory, version="v0003", kind="full", base_version="v0003", reference_version="v0000")
    with pytest.raises(ManifestError, match=r"v0003 has optimizer\.pt; weights are safetensors only"):
        verify(directory)


def test_what_a_killed_publisher_left_is_cleared_and_never_visible(tmp_path: Path) -> None:
    final = tmp_path / "v0005"
    (new_staging(final) / "half").write_text("")
    assert not final.exists()
    assert list(new_staging(final).iterdir()) == []


def test_a_version_is_never_published_over(tmp_path: Path) -> None:
    final = publish_version(tmp_path, "v0003")
    with pytest.raises(FileExistsError):
        publish(new_staging(final), final)
    verify(final)

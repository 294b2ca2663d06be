"""Published versions: whole or absent, verified file by file."""

from pathlib import Path

import pytest

from server.shared.errors import ManifestError
from server.store.files.manifest import copy_tokenizer, new_staging, new_version, verify, write_manifest
from tests.server.conftest import publish_version


def test_a_published_version_verifies(tmp_path: Path) -> None:
    manifest = verify(publish_version(tmp_path, "v0003"))
    assert (manifest.version, manifest.kind, manifest.reference_version) == ("v0003", "full", "v0000")
    assert list(manifest.files) == ["model.safetensors"]
    assert [path.name for path in (tmp_path / "policies").iterdir()] == ["v0003"]


def test_a_version_under_another_name_is_refused(tmp_path: Path) -> None:
    directory = publish_version(tmp_path, "v0003")
    with pytest.raises(ManifestError, match="v0004 has the manifest of v0003"):
        verify(directory.rename(tmp_path / "policies" / "v0004"))


def test_a_pickle_is_refused_even_if_listed(tmp_path: Path) -> None:
    directory = publish_version(tmp_path, "v0003")
    (directory / "optimizer.pt").write_bytes(b"")
    write_manifest(directory, version="v0003", kind="full", base_version="v0003", reference_version="v0000")
    with pytest.raises(ManifestError, match=r"v0003 has optimizer\.pt; weights are safetensors only"):
        verify(directory)


def test_leftovers_of_a_killed_publisher_are_removed_and_never_visible(tmp_path: Path) -> None:
    final = tmp_path / "v0005"
    (new_staging(final) / "half").write_text("")
    assert not final.exists()
    assert list(new_staging(final).iterdir()) == []


def test_a_published_version_is_never_overwritten(tmp_path: Path) -> None:
    final = publish_version(tmp_path, "v0003")
    with pytest.raises(FileExistsError), new_version(final, kind="full", reference_version="v0000"):
        pass
    verify(final)


def test_an_adapters_base_is_its_reference(tmp_path: Path) -> None:
    with new_version(tmp_path / "v0001", kind="adapter", reference_version="v0000", info={"step": 3}) as staging:
        (staging / "adapter_config.json").write_text("{}")
    manifest = verify(tmp_path / "v0001")
    assert (manifest.kind, manifest.base_version, manifest.info) == ("adapter", "v0000", {"step": 3})


def test_a_version_that_could_not_be_written_does_not_exist(tmp_path: Path) -> None:
    final = tmp_path / "v0001"

    def fill_the_disk() -> None:
        with new_version(final, kind="full", reference_version="v0000") as staging:
            (staging / "half").write_text("x")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        fill_the_disk()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ManifestError, match="v0001 has no directory"):
        verify(final)
    with new_version(final, kind="full", reference_version="v0000"):
        pass
    assert verify(final).files == {}


def test_a_changed_version_is_refused(tmp_path: Path) -> None:
    directory = publish_version(tmp_path, "v0003")
    (directory / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ManifestError, match=r"v0003/model\.safetensors does not have the SHA-256"):
        verify(directory)


def test_whatever_a_tokenizer_needs_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "v0000", tmp_path / "v0001"
    files = {
        "tokenizer.json": "words",
        "tokenizer.model": "pieces",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "generation_config.json": "{}",
        "config.json": "{}",
        "model.safetensors": "weights",
        "model.safetensors.index.json": "{}",
        "manifest.json": "{}",
    }
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    target.mkdir()
    (target / "generation_config.json").write_text("its own")
    copy_tokenizer(source, target)
    assert {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()} == {
        "tokenizer.json": "words",
        "tokenizer.model": "pieces",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "generation_config.json": "its own",
    }

"""The model to serve: what it lacks, its shape, and its needs of memory, disk and time."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.settings import LearnerSettings
from server.doctor.examine import DoctorSettings
from server.doctor.model import SMOLLM2, Model, read_model
from server.doctor.needs import Needs, needs_of
from server.doctor.speed import Sample, Speed, expected, measure, samples
from server.reference import reference
from server.reference.reference import find_model, prepare_reference
from server.shared.errors import DataDirectoryError
from server.shared.model.dtype import DtypeName
from server.shared.model.needs import Training
from server.shared.model.shape import ModelShape, shape_of
from tests.learner.conftest import save_tiny_model
from tests.learner.rounds import make_reference

MIB = 2**20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    save_tiny_model(directory)
    return directory


def test_the_packaged_models_shape_matches_its_file() -> None:
    from gguf import GGUFReader

    directory, options = find_model("smollm2")
    reader = GGUFReader(Path(directory) / options["gguf_file"])
    # gguf writes a matrix's inputs first.
    tensors = {tensor.name: [int(size) for size in reversed(tensor.shape)] for tensor in reader.tensors}
    assert shape_of(tensors) == SMOLLM2


def test_a_model_directory_is_read_by_its_headers(tmp_path: Path, model: Path) -> None:
    found = read_model(tmp_path / "data", str(model))
    assert (found.problem, found.fetched) == ("", True)
    assert found.shape is not None
    assert found.shape.head[0] == json.loads((model / "config.json").read_text())["vocab_size"]
    assert not (tmp_path / "data").exists()


def no_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()


def truncated(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 1000)


def pointer(directory: Path) -> None:
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def a_shard_missing(directory: Path) -> None:
    shards = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (no_template, r"has no chat template; give an instruction-tuned model\."),
        (
            truncated,
            r"cannot be read: model/model.safetensors is not a valid safetensors file \(.*\)\. Download it again\.",
        ),
        (
            pointer,
            r"has only a Git LFS pointer for model.safetensors; run `git lfs pull` in its directory\.",
        ),
        (a_shard_missing, r"lacks model-00002-of-00002.safetensors; download the whole model\."),
    ],
)
def test_what_a_model_directory_lacks(tmp_path: Path, model: Path, spoil: Callable[[Path], None], problem: str) -> None:
    spoil(model)
    assert re.fullmatch(
        f"--model '{re.escape(str(model))}' {problem}", read_model(tmp_path / "data", str(model)).problem
    )
    # The server refuses it for the same reason, before it reads any weights.
    with pytest.raises(DataDirectoryError, match=problem):
        prepare_reference(tmp_path / "data", str(model), lambda line: None)
    assert not (tmp_path / "data").exists()


def test_a_chat_template_may_be_in_the_tokenizer_config(model: Path) -> None:
    no_template(model)
    values = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**values, "chat_template": "{{ messages }}"}))
    assert read_model(model.parent / "data", str(model)).problem == ""


def test_a_default_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PACKAGE", "no_such_package")
    with pytest.raises(DataDirectoryError, match="no_such_package is not installed: `make setup`, or give another"):
        find_model("smollm2")


def test_an_existing_reference_is_used(tmp_path: Path, model: Path) -> None:
    make_reference(tmp_path / "data", model)
    shutil.rmtree(model)
    manifest = tmp_path / "data" / "policies" / "v0000" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "info": {"model": "mine"}}))
    assert read_model(tmp_path / "data", "mine").shape is not None
    assert read_model(tmp_path / "data", "other").problem.endswith(
        "was made from 'mine', not 'other': start with --model mine, or change the model with `learner rebase --model "
        "other`, which keeps all votes."
    )
    manifest.unlink()
    assert "The reference cannot be used: v0000 has no manifest.json" in read_model(tmp_path / "data", "mine").problem


def test_a_model_that_is_not_on_this_machine(tmp_path: Path) -> None:
    assert read_model(tmp_path, "nobody/nothing") == Model(fetched=False)
    assert read_model(tmp_path, "no such/id/at all").problem == (
        "--model 'no such/id/at all' is neither a directory nor a Hugging Face id."
    )


def needs(dtype: DtypeName, kv_cache_gib: int, tokens: int, checkpoint: Any = "auto") -> Needs:
    training = Training("lora", 16, tokens, 32 * 64, checkpoint=False)
    return needs_of(SMOLLM2, dtype, kv_cache_gib, training, checkpoint)


def test_needs_are_near_what_was_measured() -> None:
    found = needs("bfloat16", 1, 2048)
    # docs/benchmarks/soak.md: 707 and 3,073 MiB; docs/benchmarks/ppo.md: 7.0 GiB.
    assert found.server // MIB == 3789
    assert found.round // MIB == 7266
    assert found.version == 269_030_016


def test_needs_grow_with_their_inputs() -> None:
    base = needs("bfloat16", 1, 2048)
    double = needs("float32", 1, 1024)
    assert double.version == 2 * base.version
    assert double.server - base.server == 2 * base.version
    assert needs("bfloat16", 3, 2048).server - base.server == 2 * 2**30
    assert needs("bfloat16", 1, 1024).round < base.round - 1000 * MIB


def test_a_round_needs_less_with_checkpoints() -> None:
    kept, again = needs("bfloat16", 1, 2048, "off"), needs("bfloat16", 1, 2048, "on")
    assert kept.round == kept.least_round
    assert again.round == again.least_round < kept.round - 1000 * MIB
    either = needs("bfloat16", 1, 2048, "auto")
    assert (either.round, either.least_round) == (kept.round, again.least_round)


@pytest.mark.parametrize(
    ("name", "value"), [("keep_versions", 8), ("learner_device", "auto"), ("learner_gpu_memory_share", 0.3)]
)
def test_the_learners_defaults_are_used(name: str, value: object) -> None:
    assert DoctorSettings.model_fields[name].default == LearnerSettings.model_fields[name].default == value


@pytest.mark.parametrize("table", ["policy", "ppo"])
def test_the_learners_defaults_of_a_table_are_used(table: str) -> None:
    shared, learners = getattr(DoctorSettings(), table), getattr(LearnerSettings(), table)
    assert shared.model_dump() == {name: getattr(learners, name) for name in type(shared).model_fields}


def test_speed_is_a_share_of_the_matrix_products() -> None:
    assert expected(0.02, 0.04, 0.1) == Speed(25.0, 200.0, 0.67 * 2560)


def test_products_are_sampled_within_a_budget() -> None:
    # A layer's matrices of 576 columns have 4,608 rows: 10.1 MiB in float32, of which 6 fit into 64 MiB.
    assert samples(SMOLLM2.matrices, 4) == [Sample(4608, 576, 6, 30.0), Sample(576, 1536, 18, 30.0)]
    # The head alone is larger than that.
    assert samples({(49_152, 576): 1}, 4) == [Sample(29_127, 576, 1, 49_152 / 29_127)]
    assert samples({(8, 4): 3}, 2) == [Sample(8, 4, 3, 3.0)]


def test_this_machine_is_measured() -> None:
    tiny = ModelShape(1000, (100, 8), {(8, 8): 4, (4, 8): 2}, layers=2, outputs=40)
    speed = measure(tiny, "float32", 1)
    assert speed.one > 100
    assert speed.sixteen > speed.one

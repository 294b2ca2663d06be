"""v0000 is made from any spelling of a model, with what is needed of its files, and also from a model with code."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.doctor.model import Model, read_model
from server.reference import model_hub
from server.reference.reference import find_model, identity, prepare_reference, same_model
from server.shared.errors import DataDirectoryError
from server.shared.model.load import UntrustedCodeError, load_model
from server.shared.model.text import ChatText, UnknownTokenError
from server.store.files.manifest import read_manifest, verify
from tests.families.configs import WORDS, logits, save
from tests.learner.conftest import save_tiny_model
from tests.server.reference.test_model_checks import AUTO_MAP, CODE, change, tokens
from tests.server.reference.test_text_model import MODELS, whole
from tests.words import save_words


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    return tmp_path / "model"


def prepared(model: str | Path, data_dir: Path, trust_remote_code: bool = False) -> Path:
    assert read_model(data_dir, str(model), trust_remote_code).problem == ""
    return prepare_reference(data_dir, str(model), lambda line: None, trust_remote_code)


def table(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"num_beams": 1, "early_stopping": True},
        {"max_new_tokens": -1},
        {"temperature": -3.0},
        {"early_stopping": "sometimes"},
        {"num_return_sequences": 4, "do_sample": False},
        {"cache_implementation": "none of them"},
        {"suppress_tokens": [2], "forced_eos_token_id": 2},
    ],
    ids=lambda values: "+".join(values),
)
def test_settings_of_sampling_are_dropped(model: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    change("generation_config.json", eos_token_id=[2, 5, 7], bos_token_id=1, pad_token_id=None, **values)(model)
    saved = table(prepared(model, tmp_path / "data") / "generation_config.json")
    saved.pop("transformers_version")
    saved.pop("_from_model_config", None)
    assert saved == {"bos_token_id": 1, "eos_token_id": [2, 5, 7], "pad_token_id": 2}


def test_settings_of_sampling_in_the_configuration_are_dropped(model: Path, tmp_path: Path) -> None:
    change("config.json", temperature=0.3, do_sample=False, max_length=7, early_stopping=True)(model)
    (model / "generation_config.json").unlink()
    saved = table(prepared(model, tmp_path / "data") / "generation_config.json")
    assert saved["eos_token_id"] == 2
    assert not {"temperature", "do_sample", "max_length", "early_stopping"} & saved.keys()


def test_an_end_that_only_the_configuration_names_is_the_tokenizers_too(model: Path, tmp_path: Path) -> None:
    change("tokenizer_config.json", eos_token=None)(model)
    (model / "generation_config.json").unlink()
    directory = prepared(model, tmp_path / "data")
    assert table(directory / "generation_config.json")["eos_token_id"] == 2
    assert ChatText.load(directory).answer("w7") == [7, 2]


@pytest.mark.parametrize("class_name", ["NoSuchTokenizer", "NoSuchTokenizerFast"])
def test_a_tokenizer_class_that_does_not_exist_is_not_needed(model: Path, tmp_path: Path, class_name: str) -> None:
    change("tokenizer_config.json", tokenizer_class=class_name)(model)
    assert ChatText.load(prepared(model, tmp_path / "data")).prompt([{"role": "user", "content": "w7"}], 0.0) == [
        1,
        7,
        3,
    ]


def test_tensors_that_the_model_has_no_use_for_are_left_out(model: Path, tmp_path: Path, capfd: Any) -> None:
    weights = load_file(model / "model.safetensors")
    save_file(weights | {"vision_tower.weight": torch.ones(2, 2)}, model / "model.safetensors", {"format": "pt"})
    (model / "consolidated.safetensors").write_text("not read")
    directory = prepared(model, tmp_path / "data")
    assert set(load_file(directory / "model.safetensors")) == set(weights)
    assert "vision_tower" not in capfd.readouterr().err


def test_weights_in_parts_and_in_other_dtypes(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(weights)}
    for shard in set(where.values()):
        part = {name: weights[name].half() for name in weights if where[name] == shard}
        save_file(part, model / shard, {"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    saved = load_file(prepared(model, tmp_path / "data") / "model.safetensors")
    assert all(torch.equal(saved[name], tensor.half().bfloat16()) for name, tensor in weights.items())


def test_a_text_with_a_token_that_has_no_embedding(model: Path, tmp_path: Path) -> None:
    tokens({"content": "<late>"}, {"content": "<later>"})(model)
    text = ChatText.load(prepared(model, tmp_path / "data"))
    assert text.embeddings == 40
    assert text.prompt([{"role": "user", "content": "w5"}], 0.0) == [1, 5, 3]
    with pytest.raises(UnknownTokenError, match="the token '<late>', for which this model has no embedding"):
        text.prompt([{"role": "user", "content": "w5 <late> w6"}], 0.0)
    with pytest.raises(UnknownTokenError, match="the token '<later>'"):
        text.answer("w5 <late> <later>")


def spellings(model: Path) -> list[str]:
    link = model.parent / "link"
    link.symlink_to(model)
    return ["model", "./model", "model/", str(model), f"{model}/", str(link), "link", "~/model", "../home/model"]


def test_every_spelling_of_a_directory_is_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    save_tiny_model(home / "model")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    directory = prepared("model", tmp_path / "data")
    assert read_manifest(directory).info["model"] == str(home / "model")
    for spelling in spellings(home / "model"):
        assert prepared(spelling, tmp_path / "data") == directory
        assert find_model(spelling) == (str(home / "model"), {})
    shutil.copytree(home / "model", home / "other")
    with pytest.raises(
        DataDirectoryError,
        match=r"was made from '.*/home/model', not './other': start with --model /.*/home/model, or change the model "
        r"with `learner rebase --model ./other`, which keeps all votes\.",
    ):
        prepare_reference(tmp_path / "data", "./other", lambda line: None)
    shutil.rmtree(home / "model")
    assert prepared("model", tmp_path / "data") == prepared("./model", tmp_path / "data") == directory


@pytest.mark.parametrize(
    ("made_from", "model", "same"),
    [
        ("plain", "plain", True),
        ("plain", "./plain", True),
        ("plain", "{here}/plain", True),
        ("{here}/plain", "plain", True),
        ("gone", "gone", True),
        ("gone", "./gone", False),
        ("plain", "other", False),
        ("smollm2", "smollm2", True),
        ("smollm2", "./smollm2", False),
        ("{here}/smollm2", "smollm2", False),
        ("org/name", "org/name", True),
        ("org/name", "./org/name", False),
    ],
)
def test_references_of_earlier_versions_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_from: str, model: str, same: bool
) -> None:
    for name in ("plain", "other", "smollm2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert same_model(made_from.format(here=tmp_path), model.format(here=tmp_path)) is same
    assert identity("org/name") == "org/name"


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

from .layers import SCALE


class MyConfig(LlamaConfig):
    model_type = "mine"


class MyModel(LlamaForCausalLM):
    config_class = MyConfig

    def scale(self):
        return SCALE
"""


def give_code(model: Path) -> None:
    """Makes it a model whose type only its own code knows, in two files."""
    (model / "modeling_mine.py").write_text(OWN_CODE)
    (model / "layers.py").write_text("SCALE = 42\n")
    change("config.json", model_type="mine", architectures=["MyModel"], auto_map=AUTO_MAP)(model)


@pytest.fixture
def coded(model: Path) -> Path:
    give_code(model)
    return model


def test_a_models_own_code_runs_only_if_it_is_trusted(coded: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    assert read_model(data_dir, str(coded)).problem == f"--model {str(coded)!r} {CODE}"
    with pytest.raises(DataDirectoryError) as refused:
        prepare_reference(data_dir, str(coded), lambda line: None)
    assert str(refused.value) == f"--model {str(coded)!r} {CODE}"
    assert not data_dir.exists()
    reference = prepared(coded, data_dir, trust_remote_code=True)
    verify(reference)
    shutil.rmtree(coded)
    assert type(load_model(reference, trust_remote_code=True)).__name__ == "MyModel"
    # Without the setting it cannot be served any more, and nobody is asked.
    with pytest.raises(DataDirectoryError, match="The reference v0000 runs Python code of its own: read it"):
        prepare_reference(data_dir, str(coded), lambda line: None)
    assert read_model(data_dir, str(coded)).problem == f"The reference v0000 {CODE}"
    with pytest.raises(UntrustedCodeError, match="v0000 runs Python code of its own"):
        load_model(reference)
    with pytest.raises(UntrustedCodeError):
        ChatText.load(reference)


def test_a_reference_with_code_loads_from_there_alone(coded: Path, tmp_path: Path) -> None:
    reference = prepared(coded, tmp_path / "data", trust_remote_code=True)
    shutil.rmtree(coded)
    check = (
        "import sys, torch; from pathlib import Path; from learner.model.policy import TrainablePolicy; "
        "from learner.improve_settings import PolicySettings; from server.shared.model.text import ChatText; "
        "from server.shared.model.context import context_length; source = Path(sys.argv[1]); "
        "cpu = torch.device('cpu'); "
        "policy = TrainablePolicy.create(source, PolicySettings(lora_rank=2), torch.float32, cpu, 0, True); "
        "print(policy.model.get_base_model().scale(), ChatText.load(source, True).answer('w7'), "
        "context_length(source, 2048, True))"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", check, str(reference)],
        capture_output=True, text=True, timeout=120, check=False, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout == "42 [7, 2] 128\n", done.stderr


def test_code_is_ignored_where_transformers_knows_the_model(model: Path, tmp_path: Path) -> None:
    change("config.json", auto_map=AUTO_MAP)(model)
    change("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_mine.MyTokenizer"]})(model)
    reference = prepared(model, tmp_path / "data")
    assert "auto_map" not in table(reference / "config.json")
    assert "auto_map" not in table(reference / "tokenizer_config.json")
    assert type(load_model(reference, trust_remote_code=True)).__name__ == "LlamaForCausalLM"


def test_an_id_that_is_not_here(tmp_path: Path) -> None:
    assert read_model(tmp_path / "data", "nobody/nothing") == Model(fetched=False)
    for name, what in (
        ("nobody/nothing", "is not on this machine, and HF_HUB_OFFLINE forbids fetching it: give --model a directory."),
        ("no such/id/at all", "is neither a directory nor a Hugging Face id."),
        ("", "is neither a directory nor a Hugging Face id."),
    ):
        with pytest.raises(DataDirectoryError) as refused:
            prepare_reference(tmp_path / "data", name, lambda line: None)
        assert str(refused.value) == f"--model {name!r} {what}"
    assert not (tmp_path / "data").exists()


def http(name: str) -> Exception:
    import huggingface_hub.errors as errors
    from httpx2 import Request, Response

    kind = getattr(errors, name)
    found: Exception = kind("no", response=Response(403, request=Request("GET", "https://huggingface.co/me/mine")))
    return found


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            lambda: http("GatedRepoError"),
            "is gated: accept its terms on https://huggingface.co/me/mine, and log in with `hf auth login`.",
        ),
        (
            lambda: http("RepositoryNotFoundError"),
            "is neither a directory nor a model on Hugging Face that this user may read; check its name, or log in "
            "with `hf auth login`.",
        ),
        (
            lambda: OSError(28, "No space left on device"),
            "cannot be fetched ([Errno 28] No space left on device); check the network and the disk, or give --model a "
            "directory.",
        ),
        (
            lambda: ConnectionError("Connection refused\nand more"),
            "cannot be fetched (Connection refused); check the network and the disk, or give --model a directory.",
        ),
    ],
)
def test_an_id_that_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], what: str
) -> None:
    def fetch(*arguments: Any, **named: Any) -> str:
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(DataDirectoryError) as refused:
        prepare_reference(tmp_path / "data", "me/mine", lambda line: None)
    assert str(refused.value) == f"--model 'me/mine' {what}"


class Hub:
    """The two calls of huggingface_hub, over a directory."""

    def __init__(self, files: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fetched: list[str] = []
        self._files, self._snapshot = files, cache / "0123abc"
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", self.try_to_load_from_cache)

    def snapshot_download(self, model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision in (None, "0123abc")
        self._snapshot.mkdir(exist_ok=True, parents=True)
        for pattern in allow_patterns:
            for path in self._files.glob(pattern):
                self.fetched.append(path.name)
                shutil.copy(path, self._snapshot)
        return str(self._snapshot)

    def try_to_load_from_cache(self, model: str, name: str) -> str | None:
        return str(self._snapshot / name) if (self._snapshot / name).exists() else None


def test_an_id_is_fetched_small_files_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "pytorch_model.bin").write_text("not needed")
    hub = Hub(model, tmp_path / "cache", monkeypatch)
    assert prepare_reference(tmp_path / "data", "me/mine", lambda line: None).is_dir()
    assert hub.fetched[-1] == "model.safetensors"
    assert "pytorch_model.bin" not in hub.fetched
    assert read_manifest(tmp_path / "data" / "policies" / "v0000").info["model"] == "me/mine"
    assert read_model(tmp_path / "elsewhere", "me/mine").shape is not None


def test_a_tokenizer_that_transformers_corrects_by_its_id(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change("tokenizer_config.json", tokenizer_class="LlamaTokenizer")(model)
    Hub(model, tmp_path / "cache", monkeypatch)
    directory = prepare_reference(tmp_path / "data", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", lambda line: None)
    assert table(directory / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    # LlamaTokenizer adds tokens of its own.
    with pytest.raises(DataDirectoryError, match="it has 40 embeddings and none for the bos_token_id 40"):
        prepare_reference(tmp_path / "other", "me/mine", lambda line: None)


def test_an_unusable_id_costs_no_download(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "chat_template.jinja").unlink()
    hub = Hub(model, tmp_path / "cache", monkeypatch)
    with pytest.raises(DataDirectoryError, match="--model 'me/mine' has no chat template; give an instruction-tuned"):
        prepare_reference(tmp_path / "data", "me/mine", lambda line: None)
    assert "model.safetensors" not in hub.fetched
    # Not all of it is here, so the doctor says only that.
    assert read_model(tmp_path / "data", "me/mine") == Model(fetched=False)


def test_an_id_without_weights_or_in_parts(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "model.safetensors").rename(model / "part.safetensors")
    hub = Hub(model, tmp_path / "cache", monkeypatch)
    with pytest.raises(DataDirectoryError, match="has no weights"):
        prepare_reference(tmp_path / "data", "me/mine", lambda line: None)
    index = {"metadata": {}, "weight_map": {"any": "part.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    prepare_reference(tmp_path / "data", "me/mine", lambda line: None)
    assert hub.fetched[-1] == "part.safetensors"


def test_offline_what_was_fetched_before_will_do(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub = Hub(model, tmp_path / "cache", monkeypatch)
    prepare_reference(tmp_path / "data", "me/mine", lambda line: None)

    def incomplete(*arguments: Any, **named: Any) -> str:
        raise LocalEntryNotFoundError("incomplete: onnx/config.json")

    monkeypatch.setattr("huggingface_hub.snapshot_download", incomplete)
    hub.fetched.clear()
    assert prepare_reference(tmp_path / "other", "me/mine", lambda line: None).is_dir()


def test_no_module_loads_by_itself(root: Path) -> None:
    """Each would have to say whether code is trusted."""
    loads = {
        str(path.relative_to(root))
        for top in ("server", "learner")
        for path in (root / top).rglob("*.py")
        if any(name in path.read_text() for name in ("AutoConfig.", "AutoTokenizer.", "AutoModelForCausalLM."))
    }
    assert loads == {"server/shared/model/load.py"}
    assert model_hub.SMALL[0] == "*.json"


def test_a_family_that_cannot_be_served_is_refused_also_once_it_is_the_reference(tmp_path: Path) -> None:
    save("phimoe", tmp_path / "model")
    path, data_dir = str(tmp_path / "model"), tmp_path / "data"
    sentence = (
        f"--model {path!r} is of the family phimoe, which cannot be served here: vLLM 0.32 cannot run it: "
        '"too many values to unpack (expected 3)"; docs/models.md lists families that can.'
    )
    assert read_model(data_dir, path).problem == sentence
    with pytest.raises(DataDirectoryError) as refused:
        prepare_reference(data_dir, path, lambda line: None)
    assert str(refused.value) == sentence
    assert not data_dir.exists()


def test_a_family_that_this_processor_cannot_serve_is_refused_although_it_was_prepared(tmp_path: Path) -> None:
    save("qwen3_next", tmp_path / "model")
    path, data_dir = str(tmp_path / "model"), tmp_path / "data"
    assert prepare_reference(data_dir, path, lambda line: None, dtype="bfloat16").is_dir()
    sentence = (
        f'--model {path!r} is of the family qwen3_next, which cannot be served here: vLLM for CPUs says "CPU GDN '
        'attention requires BF16"; docs/models.md lists families that can.'
    )
    assert read_model(data_dir, path, dtype="float32").problem == sentence
    with pytest.raises(DataDirectoryError) as refused:
        prepare_reference(data_dir, path, lambda line: None, dtype="float32")
    assert str(refused.value) == sentence


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_of_a_model_that_also_reads_images_the_text_part_is_served(family: str, tmp_path: Path) -> None:
    part_family, text, values = MODELS[family]
    original = whole(family, text, **values)
    # v0000 is stored in bfloat16.
    for parameter in original.parameters():
        parameter.data = parameter.data.bfloat16().float()
    original.save_pretrained(tmp_path / "model")
    save_words(tmp_path / "model", WORDS, end=2)
    reference = prepared(tmp_path / "model", tmp_path / "data")
    assert table(reference / "config.json")["model_type"] == part_family
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        served = load_model(reference, dtype=torch.float32, attn_implementation="eager").eval()
        assert (logits(served, ids) - logits(original, ids)).abs().max() < 1e-5

"""A model that cannot be served is refused in one sentence, the same from doctor and server, with nothing on disk."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.doctor.model import read_model
from server.reference.reference import find_model, prepare_reference
from server.shared.errors import DataDirectoryError
from tests.learner.conftest import save_tiny_model

Spoil = Callable[[Path], object]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "model"
    save_tiny_model(directory)
    return directory


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def problem(model: Path) -> str:
    """What doctor and server say of the model, without its name; nothing is on disk afterwards."""
    data_dir = model.parent / "data"
    said = read_model(data_dir, str(model)).problem
    with pytest.raises(DataDirectoryError) as refused:
        prepare_reference(data_dir, str(model), lambda line: None)
    assert str(refused.value) == said
    assert not data_dir.exists()
    assert "\n" not in said
    start = f"--model {str(model)!r} "
    assert said.startswith(start)
    return said.removeprefix(start)


def write(name: str, content: str | bytes) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data)


def remove(*names: str) -> Spoil:
    return lambda directory: [(directory / name).unlink() for name in names]


def change(name: str, **values: Any) -> Spoil:
    """Sets keys of a JSON file; None removes one."""

    def spoil(directory: Path) -> None:
        table = json.loads((directory / name).read_text()) | values
        kept = {key: value for key, value in table.items() if value is not None}
        (directory / name).write_text(json.dumps(kept))

    return spoil


def config(**values: Any) -> Spoil:
    return change("config.json", **values)


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(directory: Path) -> None:
        found = load_file(directory / WEIGHTS)
        edit(found)
        save_file(found, directory / WEIGHTS, {"format": "pt"})

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda directory: [spoil(directory) for spoil in spoils]


def a_directory(name: str) -> Spoil:
    return both(remove(name), lambda directory: (directory / name).mkdir())


FILES: dict[str, tuple[Spoil, str]] = {
    "a pointer for the weights": (
        write(WEIGHTS, POINTER),
        "has only a Git LFS pointer for model.safetensors; run `git lfs pull` in its directory.",
    ),
    "a pointer for the tokenizer": (
        write("tokenizer.json", POINTER),
        "has only a Git LFS pointer for tokenizer.json; run `git lfs pull` in its directory.",
    ),
    "a pointer for the configuration": (
        write("config.json", POINTER),
        "has only a Git LFS pointer for config.json; run `git lfs pull` in its directory.",
    ),
    "a pointer for PyTorch's weights": (
        both(remove(WEIGHTS), write("pytorch_model.bin", POINTER)),
        "has only a Git LFS pointer for pytorch_model.bin; run `git lfs pull` in its directory.",
    ),
    "half of PyTorch's weights": (
        both(remove(WEIGHTS), write("pytorch_model.bin", b"PK\x03\x04" + bytes(500))),
        "cannot be read: pytorch_model.bin is not a whole PyTorch file. Download it again.",
    ),
    "empty weights": (write(WEIGHTS, ""), "cannot be used: its model.safetensors is empty; download it again."),
    "an empty tokenizer": (
        write("tokenizer.json", ""),
        "cannot be used: its tokenizer.json is empty; download it again.",
    ),
    "weights that are a directory": (a_directory(WEIGHTS), "has no weights (*.safetensors); download the whole model."),
    "a shard missing": (
        both(
            remove(WEIGHTS), write(WEIGHTS + ".index.json", '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
        ),
        "lacks model-00002-of-00002.safetensors; download the whole model.",
    ),
    "a shard of PyTorch's weights missing": (
        both(remove(WEIGHTS), write("pytorch_model.bin.index.json", '{"weight_map": {"a": "pytorch_model-1.bin"}}')),
        "lacks pytorch_model-1.bin; download the whole model.",
    ),
    "shards without an index": (
        lambda directory: (directory / WEIGHTS).rename(directory / "model-00001-of-00002.safetensors"),
        "lacks model.safetensors.index.json; download the whole model.",
    ),
    "an index without files": (
        both(remove(WEIGHTS), write(WEIGHTS + ".index.json", '{"weight_map": []}')),
        "cannot be used: its model.safetensors.index.json names no files; download it again.",
    ),
    "an index without metadata": (
        both(
            lambda directory: (directory / WEIGHTS).rename(directory / "part.safetensors"),
            write(WEIGHTS + ".index.json", '{"weight_map": {"a": "part.safetensors"}}'),
        ),
        "cannot be used: its model.safetensors.index.json has no metadata; download it again.",
    ),
    "a broken index": (
        both(remove(WEIGHTS), write(WEIGHTS + ".index.json", '{"weight_map": {')),
        "cannot be used: its model.safetensors.index.json is not JSON; download it again.",
    ),
    "a broken configuration": (
        write("config.json", "{"),
        "cannot be used: its config.json is not JSON; download it again.",
    ),
    "a configuration of deep brackets": (
        write("config.json", "[" * 100_000),
        "cannot be used: its config.json is not JSON; download it again.",
    ),
    "a configuration that is a list": (
        write("config.json", "[]"),
        "cannot be used: its config.json is not a JSON object; download it again.",
    ),
    "a configuration in Latin-1": (
        write("config.json", '{"model_type": "\xe9"}'.encode("latin-1")),
        "cannot be used: its config.json is not UTF-8; download it again.",
    ),
    "a configuration that is a directory": (
        a_directory("config.json"),
        "cannot be used: its config.json cannot be read (Is a directory); make it readable for this user.",
    ),
    "a chat template in Latin-1": (
        write("chat_template.jinja", b"\xe9"),
        "cannot be used: its chat_template.jinja is not UTF-8; download it again.",
    ),
    "broken settings of generation": (
        write("generation_config.json", "temperature: 1"),
        "cannot be used: its generation_config.json is not JSON; download it again.",
    ),
    "a broken tokenizer": (
        write("tokenizer.json", "{]"),
        "cannot be used: its tokenizer.json is not JSON; download it again.",
    ),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        "has no tokenizer (tokenizer.json); download the whole model.",
    ),
    "an adapter": (
        both(remove("config.json", WEIGHTS), write("adapter_config.json", "{}")),
        "is a LoRA adapter, not a whole model: merge it into its base model, and give the result.",
    ),
    "an adapter in a model": (
        write("adapter_config.json", "{}"),
        "is a LoRA adapter, not a whole model: merge it into its base model, and give the result.",
    ),
    "GGUF alone": (
        both(remove("config.json", WEIGHTS), write("model.Q4_0.gguf", "GGUF")),
        "has only GGUF weights, which are quantised; give the unquantised model (*.safetensors).",
    ),
    "GGUF with a configuration": (
        both(remove(WEIGHTS), write("model.Q4_0.gguf", "GGUF")),
        "has only GGUF weights, which are quantised; give the unquantised model (*.safetensors).",
    ),
}

GPTQ = {"quant_method": "gptq", "bits": 4}
QUANTISED = "is quantised ({}), and a quantised model cannot be trained; give the unquantised model."
NO_DECODER = "is no causal language model but {}; give a model that writes text."
NO_END = (
    "names no token that ends an answer (eos_token_id), so every answer would run to its limit; give an "
    "instruction-tuned model."
)
CODE = (
    "runs Python code of its own: read it, and set PREFLOOP_TRUST_REMOTE_CODE=true, for the learner too, if you trust "
    "it."
)
NO_EMBEDDING = (
    "cannot be used: it has 40 embeddings and none for the {}; give a model whose tokenizer belongs to its weights."
)
AUTO_MAP = {"AutoConfig": "modeling_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}


def template(text: str) -> Spoil:
    return write("chat_template.jinja", text)


def tokens(*added: dict[str, Any], **named: str) -> Spoil:
    """Adds tokens to the tokenizer, from id 40 on, and names some in its configuration."""

    def spoil(directory: Path) -> None:
        table = json.loads((directory / "tokenizer.json").read_text())
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        table["added_tokens"] += [plain | {"id": 40 + number} | token for number, token in enumerate(added)]
        (directory / "tokenizer.json").write_text(json.dumps(table))
        change("tokenizer_config.json", **named)(directory)

    return spoil


KINDS: dict[str, tuple[Spoil, str]] = {
    "GPTQ": (config(quantization_config=GPTQ), QUANTISED.format("gptq")),
    "of the text part": (config(text_config={"quantization_config": GPTQ}), QUANTISED.format("gptq")),
    "GPTQ by its own file": (write("quantize_config.json", "{}"), QUANTISED.format("quantize_config.json")),
    "float8": (
        tensors(lambda found: found.update({"model.norm.weight": found["model.norm.weight"].to(torch.float8_e4m3fn)})),
        QUANTISED.format("model.norm.weight is F8_E4M3"),
    ),
    "integers": (
        tensors(lambda found: found.update({"model.norm.weight": found["model.norm.weight"].to(torch.int8)})),
        QUANTISED.format("model.norm.weight is I8"),
    ),
    "no model type": (
        config(model_type=None),
        "cannot be used: its config.json names no model_type; download it again.",
    ),
    "a model type that is a list": (
        config(model_type=["llama"]),
        "cannot be used: its config.json names no model_type; download it again.",
    ),
    "CLIP": (config(model_type="clip", architectures=["CLIPModel"]), NO_DECODER.format("CLIPModel")),
    "ViT": (config(model_type="vit", architectures=None), NO_DECODER.format("vit")),
    "BERT": (config(model_type="bert", architectures=["BertForMaskedLM"]), NO_DECODER.format("BertForMaskedLM")),
    "a bare BERT": (config(model_type="bert", architectures=None), NO_DECODER.format("bert")),
    "a classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        NO_DECODER.format("LlamaForSequenceClassification"),
    ),
    "T5": (
        config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "is an encoder-decoder (t5), and only decoders can be served; give a causal language model.",
    ),
    "BART": (
        config(model_type="bart", is_encoder_decoder=True),
        "is an encoder-decoder (bart), and only decoders can be served; give a causal language model.",
    ),
    "no layers": (
        config(num_hidden_layers=0),
        "cannot be used: its config.json says that it has no layers; download it again.",
    ),
    "few positions": (
        config(max_position_embeddings=16),
        "has 16 positions, but a message with its answer needs 64 or more; give another model.",
    ),
    "code": (config(model_type="mine", auto_map=AUTO_MAP), CODE),
    "code for the model alone": (config(model_type="vit", auto_map={"AutoModelForCausalLM": "mine.Mine"}), CODE),
    "no chat template": (remove("chat_template.jinja"), "has no chat template; give an instruction-tuned model."),
    "a template without the message": (
        template("w1 w3"),
        "cannot be used: its chat template leaves out what a user writes; give another model.",
    ),
    "a tokenizer of the wrong class": (
        # Qwen2Tokenizer keeps none of these words.
        config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        "cannot be used: its tokenizer turns a message into no tokens; download it again.",
    ),
    "a template that refuses": (
        template("{{ raise_exception('not today') }}"),
        "cannot be used: its chat template cannot be rendered (not today); give a model with another template.",
    ),
    "a template that refuses a second message": (
        template("{% if messages | length > 1 %}{{ raise_exception('too long') }}{% endif %}{{ messages[0].content }}"),
        "cannot be used: its chat template cannot be rendered (too long); give a model with another template.",
    ),
    "no end": (
        both(
            config(eos_token_id=None),
            change("generation_config.json", eos_token_id=None),
            change("tokenizer_config.json", eos_token=None),
        ),
        NO_END,
    ),
    "an end that is no id": (
        both(
            config(eos_token_id=-1),
            change("generation_config.json", eos_token_id="w2"),
            change("tokenizer_config.json", eos_token=None),
        ),
        NO_END,
    ),
    "a padding token without embedding": (
        tokens({"content": "[PAD]", "special": True}, pad_token="[PAD]"),
        NO_EMBEDDING.format("pad_token_id 40"),
    ),
    "an end without embedding": (
        tokens({"content": "<end>", "special": True}, eos_token="<end>"),
        NO_EMBEDDING.format("eos_token_id 40"),
    ),
    "an end without embedding in the configuration": (
        change("generation_config.json", eos_token_id=[2, 99]),
        NO_EMBEDDING.format("eos_token_id 99"),
    ),
    "a template's token without embedding": (
        both(
            tokens({"content": "<turn>", "special": True}),
            template("{% for message in messages %}<turn> {{ message.content }} {% endfor %}w3"),
        ),
        NO_EMBEDDING.format("token '<turn>'"),
    ),
    "padding without embedding in the configuration": (config(pad_token_id=99), NO_EMBEDDING.format("pad_token_id 99")),
    "no tensors": (
        lambda directory: save_file({}, directory / WEIGHTS),
        "lacks the tensor lm_head.weight and 29 more; download the whole model.",
    ),
    "an empty table of quantisation": (config(quantization_config={}), QUANTISED.format("quantization_config")),
    "a tensor missing": (
        tensors(lambda found: found.pop("model.norm.weight")),
        "lacks the tensor model.norm.weight; download the whole model.",
    ),
    "tensors missing": (
        tensors(lambda found: [found.pop(f"model.layers.{n}.mlp.up_proj.weight") for n in (1, 2)]),
        "lacks the tensor model.layers.1.mlp.up_proj.weight and 1 more; download the whole model.",
    ),
    "a tensor of another shape": (
        tensors(lambda found: found.update({"model.norm.weight": torch.ones(8)})),
        "cannot be used: its tensor model.norm.weight has the shape [8], but its config.json means [16]; download both "
        "again.",
    ),
    "another family": (
        config(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=16, n_layer=1, n_head=2, n_positions=128),
        "lacks the tensor",
    ),
}

# The libraries' own words, which may change, after ours.
THEIRS: dict[str, tuple[Spoil, str]] = {
    "truncated weights": (
        lambda directory: os.truncate(directory / WEIGHTS, 1000),
        "cannot be read: model/model.safetensors is not a valid safetensors file (",
    ),
    "a model type from the future": (config(model_type="llama9"), "cannot be used: transformers "),
    "a tokenizer of an unknown kind": (
        change("tokenizer.json", model={"type": "Guess", "vocab": {}}),
        "cannot be used: its tokenizer cannot be read (",
    ),
    "a tokenizer of another shape": (write("tokenizer.json", "{}"), "cannot be used: its tokenizer cannot be read ("),
    "a template that is no template": (template("{% for %}"), "cannot be used: its chat template cannot be rendered ("),
    "a template of numbers": (
        template("{{ 1 / 0 }}"),
        "cannot be used: its chat template cannot be rendered (division by zero",
    ),
    "a width that is a text": (config(hidden_size="wide"), "cannot be used: its config.json cannot be read ("),
    "an activation that does not exist": (
        config(hidden_act="wiggle"),
        "cannot be used: its config.json cannot be read (",
    ),
    "rotations that do not exist": (
        config(rope_scaling={"rope_type": "nonsense"}),
        "cannot be used: its config.json cannot be read (KeyError 'nonsense'",
    ),
    "heads that do not divide": (
        config(num_attention_heads=7, head_dim=None, num_key_value_heads=7),
        "cannot be used: ",
    ),
}


@pytest.mark.parametrize("name", FILES | KINDS)
def test_a_model_is_refused(model: Path, name: str) -> None:
    spoil, sentence = (FILES | KINDS)[name]
    spoil(model)
    said = problem(model)
    assert said == sentence or (name == "another family" and said.startswith(sentence))


@pytest.mark.parametrize("name", THEIRS)
def test_a_librarys_reason_is_part_of_the_sentence(model: Path, name: str) -> None:
    spoil, begin = THEIRS[name]
    spoil(model)
    said = problem(model)
    assert said.startswith(begin)
    assert said.endswith(".")


def test_a_slow_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1}))
    (model / "merges.txt").write_text("#version\n")
    change("tokenizer_config.json", tokenizer_class="CTRLTokenizer")(model)
    assert problem(model) == (
        "cannot be used: its tokenizer (CTRLTokenizer) is not a fast one; give a model with a tokenizer.json."
    )


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_weights_that_are_not_finite(model: Path, value: float, name: str) -> None:
    tensors(lambda found: found["model.layers.1.mlp.up_proj.weight"].view(-1)[3:4].fill_(value))(model)
    with pytest.raises(
        DataDirectoryError, match=r"its tensor model.layers.1.mlp.up_proj.weight has values that are not"
    ):
        prepare_reference(model.parent / "data", str(model), lambda line: None)
    assert list((model.parent / "data" / "policies").iterdir()) == []


def test_pytorchs_weights_are_checked_when_they_are_read(model: Path) -> None:
    found = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    torch.save(
        {name: tensor for name, tensor in found.items() if name != "model.norm.weight"}, model / "pytorch_model.bin"
    )
    assert read_model(model.parent / "data", str(model)).problem == ""
    with pytest.raises(DataDirectoryError, match=r"lacks the tensor model\.norm\.weight; download the whole model\."):
        prepare_reference(model.parent / "data", str(model), lambda line: None)


@pytest.fixture
def unprivileged() -> Iterator[Callable[[], None]]:
    """Called, it gives up root's rights until the test ends."""
    user = os.geteuid()
    yield lambda: os.seteuid(user or 65534)
    os.seteuid(user)


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_directory_that_this_user_may_not_read(whole: Path, unprivileged: Callable[[], None], mode: int) -> None:
    with tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o755)
        model = Path(shutil.copytree(whole, Path(shared) / "model"))
        model.chmod(mode)
        try:
            unprivileged()
            assert problem(model) == "cannot be read (Permission denied); make it readable for this user."
            with pytest.raises(DataDirectoryError, match=r"/inside' cannot be read \(Permission denied\); make it"):
                find_model(str(model / "inside"))
        finally:
            os.seteuid(os.getuid())
            model.chmod(0o755)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("GGUF")
    (tmp_path / "model.safetensors").write_text("{}")
    assert (
        problem(tmp_path / "model.gguf") == "is a GGUF file, which is quantised; give a Hugging Face directory or id."
    )
    assert problem(tmp_path / "model.safetensors") == "is a file; give a Hugging Face directory or id."
    assert problem(tmp_path / "none") == "does not exist; give a Hugging Face directory or id."
    assert problem(tmp_path / "model.gguf" / "x") == "does not exist; give a Hugging Face directory or id."

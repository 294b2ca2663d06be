"""What is wrong with a model whose files are whole: its kind, its text, its tensors. No weights are read."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.reference.model_files import (
    ModelError,
    check_files,
    first_line,
    is_safetensors,
    read_headers,
    read_table,
    reading,
)
from server.shared.model.context import positions
from server.shared.model.dtype import DtypeName
from server.shared.model.families import family_of, limit_of
from server.shared.model.load import (
    UNTRUSTED,
    UntrustedCodeError,
    classes_for,
    load_config,
    load_tokenizer,
    quiet,
)
from server.shared.model.text import PLAIN, ChatText, UnknownTokenError, embeddings

# As the setting max_model_len.
LEAST_POSITIONS = 64
# A model's class that ends in another task: BertForMaskedLM, LlamaForSequenceClassification.
OTHER_TASK = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w*$")
KINDS = ("bos", "eos", "pad")
# The safetensors dtypes of weights, by torch's names.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Ids = dict[str, list[int]]


@dataclass(frozen=True)
class CheckedModel:
    """A model that can be served as far as its files show. `ids`: the token ids that begin (`bos`), end (`eos`) and pad
    (`pad`) a text; at least one ends it."""

    config: Any
    tokenizer: Any
    ids: Ids


def check_model(
    source: Path,
    options: dict[str, Any],
    trust_remote_code: bool,
    dtype: DtypeName,
    *,
    name: str = "",
    weights: bool = True,
) -> CheckedModel:
    """The model in a directory, which transformers reads with `options`, for an engine that computes in `dtype`;
    `name`: the id that it was fetched by; `weights`: whether its weights are there, too. Takes seconds, most of them to
    import transformers and to read the tokenizer. Raises ModelError."""
    if not options:
        check_files(source, weights=weights)
    config, raw = _checked_config(source, options, trust_remote_code)
    # By their ids transformers knows models that name a wrong class for their tokenizer.
    config.name_or_path = name or str(source)
    tokenizer = _checked_tokenizer(source, {**options, "config": config}, trust_remote_code)
    path = source / "generation_config.json"
    ids = _token_ids(read_table(path) if path.exists() else {}, raw, tokenizer)
    check_text(tokenizer, ids, embeddings(config))
    # What a directory's own code builds is only known when it runs.
    if weights and not options and not (trust_remote_code and _coded(raw)) and is_safetensors(source):
        check_tensors(source, config)
    check_family(source, dtype)
    return CheckedModel(config, tokenizer, ids)


def check_family(directory: Path, dtype: DtypeName) -> None:
    """Raise ModelError if the model in `directory` is of a family that cannot be served in `dtype` on this machine."""
    if limit := limit_of(directory, dtype, "serving"):
        raise ModelError(
            f"is of the family {family_of(directory)}, which cannot be served here: {limit.reason}; docs/models.md "
            "lists families that can."
        )


def check_tensors(source: Path, config: Any) -> None:
    """Compare the headers of a directory's safetensors with the model that its configuration describes. Raises
    ModelError."""
    import torch

    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, DTYPES.get(dtype, "int64")), device="meta")
        for name, (dtype, shape) in read_headers(source).items()
    }
    # The headers were read: what fails now is the model that the configuration describes.
    with quiet(), reading("config.json"):
        model_class, config = _class_of(config)
        _, info = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.bfloat16, device_map="meta",
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    check_loaded(info)


def check_loaded(info: dict[str, Any]) -> None:
    """Raise ModelError if transformers found a tensor missing or of another shape: it fills in random numbers.

    Tensors that the model has no use for, such as those of a vision tower, are normal."""
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"lacks {_first(missing)}; download the whole model.")
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise ModelError(
            f"cannot be used: its tensor {name} has the shape {list(found)}, but its config.json means "
            f"{list(expected)}; download both again."
        )


def check_text(tokenizer: Any, ids: Ids, most: int) -> None:
    """Raise ModelError unless the tokenizer can write and end conversations for a model with `most` embeddings."""
    if tokenizer.chat_template is None:
        raise ModelError("has no chat template; give an instruction-tuned model.")
    if not ids["eos"]:
        raise ModelError(
            "names no token that ends an answer (eos_token_id), so every answer would run to its limit; give an "
            "instruction-tuned model."
        )
    for kind in KINDS:
        for number in [*ids[kind], *_numbers(getattr(tokenizer, f"{kind}_token_id"))]:
            if number >= most:
                raise _too_large(f"the {kind}_token_id {number}", most)
    with reading("tokenizer"):
        text = ChatText(tokenizer, most)
    message, answer = {"role": "user", "content": PLAIN}, {"role": "assistant", "content": PLAIN}
    for messages in ([message], [message, answer, message]):
        try:
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            token_ids = text.prompt(messages, time.time())
        except UnknownTokenError as error:
            raise _too_large(f"the token {error.token!r}", most) from error
        except Exception as error:
            raise ModelError(
                f"cannot be used: its chat template cannot be rendered ({first_line(error)}); give a model with "
                "another template."
            ) from error
        if PLAIN.lower() not in rendered.lower():
            raise ModelError("cannot be used: its chat template leaves out what a user writes; give another model.")
        if not token_ids:
            raise ModelError("cannot be used: its tokenizer turns a message into no tokens; download it again.")


def _checked_config(source: Path, options: dict[str, Any], trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """transformers' configuration, and its table as the file has it."""
    from transformers import CONFIG_MAPPING, __version__

    raw = {} if options else read_table(source / "config.json")
    kind = raw.get("model_type")
    if not options and "AutoConfig" not in _coded(raw):
        if not isinstance(kind, str) or not kind:
            raise ModelError("cannot be used: its config.json names no model_type; download it again.")
        if kind not in CONFIG_MAPPING:
            raise ModelError(
                f"cannot be used: transformers {__version__} does not know its model_type {kind!r}; give another model."
            )
    with reading("config.json"):
        try:
            config = load_config(source, trust_remote_code, **options)
        except UntrustedCodeError as error:
            raise ModelError(UNTRUSTED) from error
        _check_kind(config, raw, trust_remote_code)
        _check_size(config)
    return config, raw or config.to_dict()


def _check_size(config: Any) -> None:
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if isinstance(layers, int) and layers < 1:
        raise ModelError("cannot be used: its config.json says that it has no layers; download it again.")
    most = embeddings(config)
    for number in _numbers(getattr(config.get_text_config(), "pad_token_id", None)):
        if number >= most:
            raise _too_large(f"the pad_token_id {number}", most)
    if (length := min([LEAST_POSITIONS, *positions(config)])) < LEAST_POSITIONS:
        raise ModelError(
            f"has {length} positions, but a message with its answer needs {LEAST_POSITIONS} or more; give another "
            "model."
        )


def _class_of(config: Any) -> tuple[Any, Any]:
    """The class that transformers has for a model that continues a text, and its part of the configuration."""
    from transformers.models.auto import auto_factory

    automatic: Any = auto_factory
    model_class = automatic._get_model_class(config, classes_for(config))
    text = config.get_text_config()
    return model_class, text if model_class.config_class is type(text) else config


def _coded(raw: dict[str, Any]) -> dict[str, Any]:
    """The classes that a directory's own code defines, by the name of transformers' class for them."""
    found = raw.get("auto_map")
    return found if isinstance(found, dict) else {}


def _check_kind(config: Any, raw: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise ModelError unless the model continues a text, or its own code may say how it does."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    kind = type(config)
    known = classes_for(config) is not None
    if "AutoModelForCausalLM" in _coded(raw) and (trust_remote_code or not known):
        if not trust_remote_code:
            raise ModelError(UNTRUSTED)
        return
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"is an encoder-decoder ({config.model_type}), and only decoders can be served; give a causal language "
            "model."
        )
    names = raw.get("architectures")
    named = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if not known or encoder or (named and all(OTHER_TASK.search(name) for name in named)):
        what = named[0] if named else config.model_type
        raise ModelError(f"is no causal language model but {what}; give a model that writes text.")


def _checked_tokenizer(source: Path, options: dict[str, Any], trust_remote_code: bool) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = load_tokenizer(source, trust_remote_code, **options)
    except UntrustedCodeError as error:
        raise ModelError(UNTRUSTED) from error
    except Exception as error:
        raise ModelError(
            f"cannot be used: its tokenizer cannot be read ({first_line(error)}); download the whole model."
        ) from error
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise ModelError(
            f"cannot be used: its tokenizer ({type(tokenizer).__name__}) is not a fast one; give a model with a "
            "tokenizer.json."
        )
    if not len(tokenizer):
        raise ModelError("cannot be used: its tokenizer has no tokens; download the whole model.")
    return tokenizer


def _token_ids(generation: dict[str, Any], config: dict[str, Any], tokenizer: Any) -> Ids:
    """The ids that begin, end and pad a text: of generation_config.json, else config.json, else the tokenizer. The
    tokenizer is told the end if it has none."""
    text = config.get("text_config")
    tables = [generation, config, text if isinstance(text, dict) else {}]
    tables.append({f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in KINDS})
    ids: Ids = {kind: [] for kind in KINDS}
    for table in tables:
        for kind, found in ids.items():
            ids[kind] = found or _numbers(table.get(f"{kind}_token_id"))
    if ids["eos"] and tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids["eos"][0])
    return ids


def _numbers(value: Any) -> list[int]:
    """Token ids of a configuration, which has one, several or none. Some write -1 for none."""
    several = value if isinstance(value, list) else [value]
    return [number for number in several if isinstance(number, int) and not isinstance(number, bool) and number >= 0]


def _too_large(what: str, most: int) -> ModelError:
    return ModelError(
        f"cannot be used: it has {most} embeddings and none for {what}; give a model whose tokenizer belongs to its "
        "weights."
    )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the tensor {names[0]}{more}"

"""The only places that load a model, its configuration or its tokenizer with transformers.

transformers asks on standard input whether it may run a directory's code unless it is told. So it is always told.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

UNTRUSTED = (
    "runs Python code of its own: read it, and set PREFLOOP_TRUST_REMOTE_CODE=true, for the learner too, if you trust "
    "it."
)


class UntrustedCodeError(ValueError):
    """The model can only be loaded by running its directory's code, and the settings forbid that."""


def load_config(source: str | Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """The configuration of the model in a directory. `options` are transformers'. Raises UntrustedCodeError."""
    from transformers import AutoConfig

    with _told(source):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def load_tokenizer(source: str | Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer of the model in a directory. Raises UntrustedCodeError."""
    from transformers import AutoTokenizer

    with _told(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def load_model(source: str | Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """The model in a directory, with random numbers for tensors that its files lack: a published version has all.
    One that also reads images needs `config` among the options. Raises UntrustedCodeError."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    images = "config" in options and classes_for(options["config"]) is MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
    with _told(source):
        return auto.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def classes_for(config: Any) -> Any:
    """transformers' mapping that has a class for a configuration: that of causal language models, or that of models
    that also read images, if their text part is one. None if neither."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING
    with_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    text = type(config.get_text_config()) in MODEL_FOR_CAUSAL_LM_MAPPING
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if with_images and text else None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' reports of what it loaded from standard error while the block runs."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _told(source: str | Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        # How transformers refuses to run code.
        if "trust_remote_code=True" not in str(error):
            raise
        raise UntrustedCodeError(f"{Path(source).name} {UNTRUSTED}") from error

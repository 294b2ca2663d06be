"""Of a model that also reads images, the text part alone: it computes what the whole one computes of text."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server.reference.text_model import text_model
from tests.families.configs import COMMON, COMPUTED, DELTA_NET, DENSE, WORDS, logits, tiny

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def whole(family: str, text: dict[str, Any], **values: Any) -> Any:
    """A tiny model with a tower for images."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    known = {name: value for name, value in (COMMON | text).items() if value is not COMPUTED}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](text_config=known, image_token_id=WORDS - 1, **values)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
MODELS = {
    "gemma3": ("gemma3_text", DENSE["gemma3_text"], {"vision_config": SIGLIP, "mm_tokens_per_image": 4}),
    "llava": ("llama", {"model_type": "llama"}, {"vision_config": CLIP}),
    "mistral3": ("mistral", {"model_type": "mistral"}, {"vision_config": {"model_type": "pixtral", **VISION}}),
    "qwen3_5": ("qwen3_5_text", DELTA_NET, {}),
}


@pytest.mark.parametrize("family", MODELS)
def test_the_part_computes_what_the_whole_computes_of_text(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    part_family, text, values = MODELS[family]
    model = whole(family, text, **values)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = logits(model, ids)
        text_model(model).save_pretrained(tmp_path)
        part: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        assert (logits(part, ids) - expected).abs().max() < 1e-5
    assert part.config.model_type == part_family
    assert not [name for name in part.state_dict() if "vision" in name or "visual" in name]


def test_a_model_of_text_alone_is_its_own_part() -> None:
    model = tiny("llama")
    assert text_model(model) is model


def test_a_text_part_that_is_no_model_by_itself_is_refused() -> None:
    model = whole("qwen2_vl", {"model_type": "qwen2_vl_text"}, vision_config={"depth": 1, "embed_dim": 32})
    with pytest.raises(ValueError, match=r"^its text part, qwen2_vl_text, is not a model by itself$"):
        text_model(model)

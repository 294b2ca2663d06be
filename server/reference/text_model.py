"""The text part of a model that also reads images or sound, as a model of its own.

prefloop serves and trains text only. Without this a vision tower would be served, stored with every version and given
adapters for nothing.
"""

from typing import Any


def text_model(model: Any) -> Any:
    """The part of `model`, which transformers loaded, that reads and writes text; `model` itself if it has no other.
    The part shares its weights. Raises ValueError if transformers cannot load that part by itself."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = model.config.get_text_config()
    if config is model.config:
        return model
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"its text part, {config.model_type}, is not a model by itself")
    with torch.device("meta"):
        part: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)  # type: ignore[operator]
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    setattr(part, part.base_model_prefix, decoder)
    part.set_output_embeddings(head)
    # The whole model's configuration decides (Mistral 3), but only the part's is saved.
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    if left := [name for name, tensor in part.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"its text part lacks {left[0]}")
    return part.to(model.dtype)

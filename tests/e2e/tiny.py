"""A model for tests that do not depend on the text: created in a second, and quick to answer.

It has four small layers of seeded weights, large enough that its answers are far from uniform. Its tokens are the
printable ASCII characters, so any text is a prompt and any answer is readable. It rarely ends an answer by itself.
"""

from pathlib import Path

CHARACTERS = [chr(code) for code in range(32, 127)]
BEGIN, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<unk>"
SPECIAL = [BEGIN, END, UNKNOWN]
CHAT_TEMPLATE = (
    f"{{% for message in messages %}}{BEGIN}{{{{ message.role }}}} {{{{ message.content }}}}{END}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{BEGIN}assistant {{% endif %}}"
)


def save_tiny_model(directory: Path, characters: list[str] = CHARACTERS) -> None:
    """Writes a Hugging Face directory for `--model`. Another order of the characters makes another model: its token ids
    mean something else."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(SPECIAL + characters)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=UNKNOWN, chat_template=CHAT_TEMPLATE,
        additional_special_tokens=[BEGIN], clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)  # fmt: skip

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=words[BEGIN],
        eos_token_id=words[END],
        pad_token_id=words[END],
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Far less likely than any character.
        model.get_input_embeddings().weight[: len(SPECIAL)] = 0
    model.save_pretrained(directory)

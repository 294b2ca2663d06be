"""A round's memory is a sum of parts, each with its own reason to grow."""

from dataclasses import replace

from server.shared.model.needs import LOGIT_BYTES, TRAINER, RoundNeed, Training, round_need
from server.shared.model.shape import ModelShape

# Two layers of 100 numbers for a token; 1,000 words.
SHAPE = ModelShape(50_000, (1_000, 10), {(50, 10): 4}, layers=2, outputs=200)
LORA = Training("lora", lora_rank=4, tokens=30, rollout_tokens=60, checkpoint=False)
GIB = 2**30


def test_workers_share_weights_and_what_steps_them_but_neither_engines_nor_batches() -> None:
    need = RoundNeed(engine=1000, trainer=TRAINER + 600, rollout=30, activations=200, logits=40)
    assert need.of_workers(3, together=False) == replace(need, trainer=TRAINER + 200)
    assert need.of_workers(3, together=True) == RoundNeed(3000, 3 * TRAINER + 600, 90, 600, 120)


def test_the_parts_of_a_round_that_trains_adapters() -> None:
    need = round_need(SHAPE, "bfloat16", 2, LORA)
    assert need.engine == 3.5 * GIB + 100_000
    # 960 adapter weights: 2 bytes each and as many of gradient, then 16 of float32 copy, its gradient and two moments.
    assert need.trainer == TRAINER + 100_000 + 960 * (2 + 2 + 16)
    assert need.rollout == 60 * 71 * 4
    assert need.activations == 30 * 800 * 2
    assert need.logits == 4 * 30 * 1_000 * 4
    assert need.total == need.engine + need.trainer + need.rollout + need.activations + need.logits


def test_in_float32_weights_are_stepped_themselves() -> None:
    need = round_need(SHAPE, "float32", 2, LORA)
    assert need.trainer == TRAINER + 200_000 + 960 * (4 + 12)
    assert need.activations == 30 * 800 * 4


def test_all_weights_need_a_frozen_copy_and_adams_state() -> None:
    need = round_need(SHAPE, "bfloat16", 2, replace(LORA, train="full"))
    assert need.trainer == TRAINER + 100_000 + 100_000 + 50_000 * 18
    full = round_need(SHAPE, "float32", 2, replace(LORA, train="full"))
    assert full.trainer == TRAINER + 400_000 + 50_000 * 12


def test_checkpoints_keep_the_inputs_of_layers_and_one_layer() -> None:
    need = round_need(SHAPE, "bfloat16", 2, replace(LORA, checkpoint=True))
    assert need.activations == 30 * (2 * 10 + 400) * 2


def test_logits_have_a_bound() -> None:
    words = replace(SHAPE, head=(150_000, 10))
    assert round_need(words, "bfloat16", 2, replace(LORA, tokens=2048)).logits == 4 * LOGIT_BYTES == 2 * GIB


def test_a_checkpointed_round_computes_fewer_logits_at_once() -> None:
    words = replace(SHAPE, head=(150_000, 10))
    assert round_need(words, "bfloat16", 2, replace(LORA, tokens=2048, checkpoint=True)).logits == GIB // 2

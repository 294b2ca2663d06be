"""Many families: our passes compute what the models themselves do, and adapters are merged into the right weights."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.improve_settings import PolicySettings
from learner.model.features import FeatureSpec, extract
from learner.model.forward import EAGER_COLUMNS, run_trunk, to_tokens, token_logprobs
from learner.model.head import trunk_of
from learner.model.passes import policy_logprobs, reference_pass
from learner.model.policy import TrainablePolicy, freeze_constants, lora
from server.shared.model.merged import base_model, checkpoint_weights
from tests.families.configs import FAMILIES, LOGITS_SD, RECURRENT, WORDS, logits, save, tiny

TEMPERATURE = 0.85
# What all prompts begin with: longer than the tiny models' windows.
SYSTEM = [5 + 7 * number % 110 for number in range(24)]
PROMPTS = [[10, 20, 30], [40, 50, 60, 70, 80], [90]]
RESPONSES = [[11, 12, 2], [21, 22, 23, 24, 25, 26], [31, 2]]


def own_logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Of each token of the response, by the model's own forward pass over this row alone."""
    text = torch.tensor([prompt + response])
    scaled = logits(model, text)[len(prompt) - 1 : -1] / TEMPERATURE
    return scaled.log_softmax(dim=-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = tiny(family), tiny(family)
    with torch.no_grad():
        assert logits(model, torch.arange(WORDS)[None]).std() >= LOGITS_SD
        # Short prompts and prompts with a common beginning, each by short rows' attention and by long rows'.
        for system, columns in itertools.product(([], SYSTEM), (EAGER_COLUMNS, 0)):
            monkeypatch.setattr("learner.model.forward.EAGER_COLUMNS", columns)
            prompts = [system + prompt for prompt in PROMPTS]
            expected = [own_logprobs(eager, *pair) for pair in zip(prompts, RESPONSES, strict=True)]
            tokens = to_tokens(prompts, RESPONSES)
            found = token_logprobs(model, run_trunk(model, tokens)[0], tokens, TEMPERATURE)
            for row, own in enumerate(expected):
                assert (found[row, : len(own)] - own).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", *RECURRENT])
def test_no_pass_has_more_tokens_at_once_than_a_micro_batch(family: str) -> None:
    """Also of families that compute a common beginning again for every row."""
    policy = TrainablePolicy(lora(tiny(family), rank=2, alpha=4), None)
    tokens = to_tokens([[*SYSTEM, 10 + row] for row in range(4)], [[11, 12, 13]] * 4)
    read: list[int] = []
    trunk_of(base_model(policy.model)).register_forward_pre_hook(
        lambda module, _, named: read.append(named["input_ids"].numel()), with_kwargs=True
    )
    policy_logprobs(policy, tokens, TEMPERATURE, 56)
    reference_pass(policy, tokens, FeatureSpec(meaning=(1,)), TEMPERATURE, 56)
    extract(policy.model, tokens, FeatureSpec(meaning=(1,)), 56, lambda rows: None)
    # Four rows of 28 tokens: two at once, or 24 of all and then each row's own four.
    assert read == ([24, 16] if family == "llama" else [56, 56]) * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_the_answers_and_are_merged_into_the_checkpoints_weights(family: str) -> None:
    model = tiny(family)
    before = dict(checkpoint_weights(model))
    tokens = to_tokens([SYSTEM], [[11, 12, 13]])
    adapted = lora(model, rank=4, alpha=8).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    logprobs = token_logprobs(adapted, run_trunk(adapted, tokens)[0], tokens, TEMPERATURE)
    logprobs.sum().backward()
    with torch.no_grad(), adapted.disable_adapter():
        unadapted = token_logprobs(adapted, run_trunk(adapted, tokens)[0], tokens, TEMPERATURE)
    assert (logprobs - unadapted).abs().max() > 0.01
    gradients = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)

    merged = dict(checkpoint_weights(adapted))
    assert {name: tensor.shape for name, tensor in merged.items()} == {name: t.shape for name, t in before.items()}
    assert any(not torch.equal(tensor, before[name]) for name, tensor in merged.items())
    # What is merged computes what the adapters do.
    with torch.no_grad():
        whole = adapted.merge_and_unload()
        found = token_logprobs(whole, run_trunk(whole, tokens)[0], tokens, TEMPERATURE)
        assert (found - logprobs).abs().max() < 1e-3
        expected = dict(checkpoint_weights(whole))
    assert all((tensor - expected[name]).abs().max() < 1e-5 for name, tensor in merged.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_a_model_can_be_trained_but_what_its_authors_do_not_train(family: str) -> None:
    model = tiny(family).requires_grad_(True)
    freeze_constants(model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    bias = "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"
    assert frozen == ([bias] if family == "ernie4_5_moe" else [])


def test_a_constant_is_neither_disturbed_nor_trained(tmp_path: Path) -> None:
    save("ernie4_5_moe", tmp_path)
    policy = TrainablePolicy.create(tmp_path, PolicySettings(train="full"), torch.float32, torch.device("cpu"))
    name = "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"
    constant = policy.model.get_parameter(name)
    assert not any(parameter is constant for parameter in policy.parameters)
    before = constant.clone()
    policy.disturb(0.1, seed=0)
    assert torch.equal(constant, before)

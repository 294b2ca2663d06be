"""Checkpointed activations: less is kept, and every number and gradient is the same, in every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import learner.model.forward as forward
import server.shared.model.needs as needs
from learner.improve_settings import PolicySettings
from learner.model.checkpointing import checkpoint_layers, checkpointed
from learner.model.features import FeatureSpec
from learner.model.forward import run_trunk, shares_prefix, to_tokens, token_logprobs
from learner.model.passes import policy_logprobs, reference_pass
from learner.model.policy import TrainablePolicy, lora
from tests.families.configs import COMMON, FAMILIES, WORDS, tiny

TEMPERATURE = 0.85
# The prompts share a beginning, which a model without checkpoints computes once.
SYSTEM = [5 + 7 * number % 110 for number in range(12)]
TOKENS = to_tokens([[*SYSTEM, 10, 20], [*SYSTEM, 90]], [[11, 12, 2], [21, 22, 23, 24]])


def adapted(family: str, checkpoint: bool) -> Any:
    """A tiny model whose adapters change it, in evaluation mode as in training."""
    model = tiny(family)
    if checkpoint:
        checkpoint_layers(model)
    model = lora(model, rank=2, alpha=4).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def passes(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and the gradients of a loss of them."""
    model.zero_grad()
    logprobs = token_logprobs(model, run_trunk(model, TOKENS)[0], TOKENS, TEMPERATURE)
    # A mean, so that gradients have about the size of a training step's.
    logprobs[TOKENS.response_mask].mean().backward()
    return logprobs.detach(), gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_and_gradients_are_those_without_checkpoints(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the common beginning is computed once, sums have another order.
    monkeypatch.setattr(forward, "MIN_SHARED", 100)
    logprobs, expected = passes(adapted(family, checkpoint=False))
    model = adapted(family, checkpoint=True)
    # Logits in pieces too: the head is computed again with the model's own code while the trunk is.
    monkeypatch.setattr(needs, "CHECKPOINTED_LOGIT_BYTES", 3 * WORDS * 4)
    found = passes(model)
    assert torch.allclose(found[0], logprobs, rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected.keys()
    assert max(expected[name].abs().max() for name in expected) > 1e-3
    for name, gradient in found[1].items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * max(1.0, float(expected[name].abs().max())), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "mamba", "falcon_h1", "recurrent_gemma"])
def test_only_the_inputs_of_layers_are_kept(family: str) -> None:
    def kept(model: Any) -> int:
        """Numbers held for the backward pass outside of checkpoints, without the model's own parameters."""
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            states = run_trunk(model, TOKENS)[0]
        del states
        return sum(held.values())

    model = adapted(family, checkpoint=True)
    assert checkpointed(model)
    assert not shares_prefix(model)
    # What the trunk keeps outside of its layers: about the embeddings and the last norm.
    assert kept(model) < 8 * TOKENS.input_ids.numel() * COMMON["hidden_size"] < kept(adapted(family, checkpoint=False))


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_policy_is_checkpointed_with_its_reference(model_directory: Path, train: Any) -> None:
    settings = PolicySettings(lora_rank=4, train=train, checkpoint_activations="on")
    policy = TrainablePolicy.create(model_directory, settings, torch.float32, torch.device("cpu"))
    kept = TrainablePolicy.create(
        model_directory, settings.model_copy(update={"checkpoint_activations": "off"}), torch.float32,
        torch.device("cpu"),
    )  # fmt: skip
    tokens = to_tokens([[5, 6, 7], [8, 9]], [[20, 21, 2], [22, 23]])
    for each, expected in ((policy, True), (kept, False)):
        with each.reference() as reference:
            assert checkpointed(each.model) == checkpointed(reference) == expected
    for parameter in (p for each in (policy, kept) for p in each.parameters):
        parameter.data.add_(0.05)

    found = {}
    for each in (policy, kept):
        logprobs = token_logprobs(each.model, run_trunk(each.model, tokens)[0], tokens, TEMPERATURE)
        # The reference's pass and one without gradients, between forward and backward.
        judged = reference_pass(each, tokens, FeatureSpec(meaning=(1, 3)), TEMPERATURE, 100)
        again = policy_logprobs(each, tokens, TEMPERATURE, 100)
        logprobs.sum().backward()
        assert torch.allclose(again, logprobs, atol=1e-6)
        assert not torch.allclose(judged.ref_logprobs, logprobs, atol=1e-2)
        found[each] = [judged.ref_logprobs, judged.features, logprobs.detach()]
        found[each] += [p.grad for p in each.parameters if p.grad is not None]
    assert len(found[policy]) > 10
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[policy], found[kept], strict=True))


def test_dropout_stays_off_in_checkpointed_layers(model_directory: Path) -> None:
    settings = PolicySettings(lora_rank=4, checkpoint_activations="on")
    policy = TrainablePolicy.create(model_directory, settings, torch.float32, torch.device("cpu"))
    assert not any(module.training for module in policy.model.modules())


def test_a_model_without_layers_to_compute_again_is_refused() -> None:
    with pytest.raises(ValueError, match="layers of Linear cannot be computed again"):
        checkpoint_layers(nn.Linear(2, 2))

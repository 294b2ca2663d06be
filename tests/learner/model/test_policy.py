"""The policy in training: it starts as its reference, PPO moves it the right way, and the engine gets its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from learner.improve.adam import Adam
from learner.improve.policy_gradient import draw_minibatches
from learner.improve.ppo.critic import Critic
from learner.improve.ppo.experience import ValuedExperience
from learner.improve.ppo.trainer import ppo_update
from learner.improve.training import check_start
from learner.improve_settings import PolicySettings, PPOSettings
from learner.model.forward import Tokens, run_trunk, to_tokens, token_logprobs
from learner.model.mismatch import Mismatch, check_push
from learner.model.policy import TrainablePolicy, lora
from server.shared.model.merged import merged_weights

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]
RESPONSES = [[20, 21, 2], [22, 23, 24, 25], [26, 2], [27]]


def settings(**changes: Any) -> PPOSettings:
    return PPOSettings(epochs=1, minibatches=1, learning_rate=1e-2, **changes)


def new_policy(directory: Path, train: Any = "lora") -> TrainablePolicy:
    return TrainablePolicy.create(directory, PolicySettings(lora_rank=4, train=train), torch.float32, CPU)


def experience(policy: TrainablePolicy, advantages: torch.Tensor | None = None) -> ValuedExperience:
    tokens = to_tokens(PROMPTS, RESPONSES)
    old = logprobs_of(policy)(tokens).detach()
    zeros = torch.zeros_like(old)
    generator = torch.Generator().manual_seed(1)
    if advantages is None:
        advantages = torch.randn(old.shape, generator=generator)
    prefix = torch.randn(*old.shape, 3, generator=generator)
    return ValuedExperience(tokens, old, old, advantages, prefix, zeros, zeros + 1)


def logprobs_of(policy: TrainablePolicy) -> Any:
    def call(tokens: Tokens) -> torch.Tensor:
        return token_logprobs(policy.model, run_trunk(policy.model, tokens)[0], tokens, 0.85)

    return call


def update(
    policy: TrainablePolicy, ppo: PPOSettings, batch: ValuedExperience, epsilon: float = 1e-5, budget: int = 12
) -> Any:
    critic = Critic(torch.zeros(3))
    optimizer = Adam([(policy.parameters, ppo.learning_rate), (list(critic.parameters()), 1e-3)], epsilon)
    passes = draw_minibatches(batch.tokens, ppo.epochs, ppo.minibatches, torch.Generator().manual_seed(0))
    return ppo_update(logprobs_of(policy), critic, optimizer, batch, ppo, passes, budget, sharing=True)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_fresh_policy_is_its_reference_and_stays_apart_from_it(model_directory: Path, train: Any) -> None:
    torch.manual_seed(0)
    policy = new_policy(model_directory, train)
    tokens = to_tokens(PROMPTS, RESPONSES)

    def reference() -> torch.Tensor:
        with policy.reference() as frozen, torch.no_grad():
            return token_logprobs(frozen, run_trunk(frozen, tokens)[0], tokens, 0.85)

    before = reference()
    check_start(logprobs_of(policy)(tokens).detach(), before)
    update(policy, settings(), experience(policy))
    assert torch.equal(reference(), before)
    with pytest.raises(RuntimeError, match="differs from its reference"):
        check_start(logprobs_of(policy)(tokens).detach(), before)


def test_the_first_minibatch_has_ratio_one(model_directory: Path) -> None:
    policy = new_policy(model_directory)
    stats = update(policy, settings(), experience(policy))
    assert stats.first_ratio_error < 1e-6
    assert stats.approx_kl < 1e-6
    assert stats.clipfrac == 0


def test_an_updates_loss_is_the_mean_over_its_tokens(model_directory: Path) -> None:
    policy = new_policy(model_directory)
    # Ten tokens in four answers, each with the advantage 1 and the ratio 1; values 0 where 1 was returned.
    batch = experience(policy, torch.ones(4, 4))
    stats = update(policy, settings(), batch)
    assert stats.policy_loss == pytest.approx(-1.0, abs=1e-6)
    assert stats.other_loss == pytest.approx(0.05, abs=1e-6)


def test_good_tokens_become_more_likely_and_bad_ones_less(model_directory: Path) -> None:
    policy = new_policy(model_directory)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(4, 4)
    batch = experience(policy, advantages)
    for _ in range(3):
        update(policy, settings(), batch)
    moved = (logprobs_of(policy)(batch.tokens).detach() - batch.old_logprobs).sum(dim=1)
    assert (moved * advantages[:, 0] > 0).all()


def test_micro_batches_do_not_change_the_update(model_directory: Path) -> None:
    found = []
    # Rows of 3, 5, 6 and 6 tokens: one by one, two by two, all at once.
    for budget in (1, 12, 24):
        torch.manual_seed(0)
        policy = new_policy(model_directory)
        # With a large epsilon Adam steps by the gradient itself, not by its sign, which noise decides near zero.
        update(policy, settings(), experience(policy), epsilon=1.0, budget=budget)
        found.append(torch.cat([p.detach().flatten() for p in policy.parameters]))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-7)
    assert torch.allclose(found[0], found[2], rtol=0, atol=1e-7)


def test_an_update_stops_once_the_policy_moved_too_far(model_directory: Path) -> None:
    policy = new_policy(model_directory)
    ppo = settings(approx_kl_stop=1e-6).model_copy(update={"epochs": 5})
    assert update(policy, ppo, experience(policy)).optimizer_steps == 1


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_engine_gets_the_trained_weights_merged(model_directory: Path, train: Any) -> None:
    from transformers import AutoModelForCausalLM

    policy = new_policy(model_directory, train)
    update(policy, settings(), experience(policy))
    served = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    weights = {name: tensor.float() for name, tensor in policy.engine_weights()}
    assert "lm_head.weight" not in weights  # tied to the embedding
    assert not any("lora" in name or "base_layer" in name for name in weights)
    missing, unexpected = served.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    tokens = to_tokens(PROMPTS, RESPONSES)
    with torch.no_grad():
        found = token_logprobs(served, run_trunk(served, tokens)[0], tokens, 0.85)
        expected = logprobs_of(policy)(tokens)
    assert (found - expected).abs().max() < 1e-4
    frozen = dict(policy.reference_weights())
    original = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).state_dict()
    assert all(torch.equal(frozen[name], original[name]) for name in frozen)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_what_was_saved_loads_again(model_directory: Path, tmp_path: Path, train: Any) -> None:
    policy = new_policy(model_directory, train)
    update(policy, settings(), experience(policy))
    expected = dict(policy.engine_weights())
    policy.save(tmp_path / "saved")
    fresh = new_policy(model_directory, train)
    fresh.load(tmp_path / "saved")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fresh.engine_weights())
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} <= {".json", ".safetensors"}


def test_saving_does_not_change_the_policy_in_training(model_directory: Path, tmp_path: Path) -> None:
    policy = new_policy(model_directory, "full")
    before = [p.dtype for p in policy.parameters]
    policy.save(tmp_path / "saved")
    assert [p.dtype for p in policy.parameters] == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_saved_adapter_merges_to_what_the_engine_got(
    model_directory: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = TrainablePolicy.create(model_directory, PolicySettings(lora_rank=4), dtype, CPU)
    update(policy, settings(), experience(policy))
    pushed = dict(policy.engine_weights())
    policy.save(tmp_path / "saved")
    assert {tensor.dtype for tensor in pushed.values()} == {dtype}
    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=dtype).float()
    merged = PeftModel.from_pretrained(base, tmp_path / "saved").merge_and_unload().to(dtype).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in pushed.items())


def test_an_adapter_on_a_transposed_layer_adds_what_peft_adds() -> None:
    """GPT-2 keeps its weights as (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    model = lora(base, 2, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found = dict(merged_weights(model))
    expected = model.merge_and_unload().state_dict()
    assert found
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_other_weights_are_refused(model_directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    policy = new_policy(model_directory, "full")
    policy.save(tmp_path)
    save_file({"something.weight": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not hold the weights"):
        policy.load(tmp_path)


def test_a_failed_push_is_noticed() -> None:
    def gap(rms: float) -> Mismatch:
        return Mismatch(rms, kl=0.0, effective_share=1.0, outside=0.0)

    check_push(gap(0.3), None, torch.bfloat16)
    check_push(gap(0.004), None, torch.float32)
    # A limit that is set counts, whatever the dtype.
    check_push(gap(0.4), 0.5, torch.float32)
    for rms, limit, dtype in ((0.4, None, torch.bfloat16), (0.01, None, torch.float32), (0.1, 0.05, torch.bfloat16)):
        with pytest.raises(RuntimeError, match="does not sample from the weights"):
            check_push(gap(rms), limit, dtype)


def test_the_seed_alone_decides_how_adapters_start(model_directory: Path) -> None:
    def first_adapter(drawn: int, seed: int) -> torch.Tensor:
        torch.manual_seed(drawn)
        policy = TrainablePolicy.create(model_directory, PolicySettings(), torch.float32, CPU, seed)
        return next(value for name, value in policy.model.named_parameters() if "lora_A" in name)

    assert torch.equal(first_adapter(drawn=1, seed=5), first_adapter(drawn=2, seed=5))
    assert not torch.equal(first_adapter(drawn=1, seed=5), first_adapter(drawn=1, seed=6))

"""PPO's losses against literals, and the whole loop against a bandit's closed form."""

import pytest
import torch
from torch import nn

from learner.improve.adam import Adam
from learner.improve.policy_gradient import draw_minibatches, policy_loss, truncated_importance_weights
from learner.improve.ppo.advantages import gae, shape_rewards
from learner.improve.ppo.critic import Critic, value_loss
from learner.improve.ppo.experience import ValuedExperience
from learner.improve.ppo.trainer import ppo_update
from learner.improve_settings import PPOSettings
from learner.model.forward import Tokens
from learner.model.mismatch import mismatch


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (1.0, 1.5, -1.2, 0.0),
        (1.0, 0.5, -0.5, -0.5),
        (-1.0, 1.5, 1.5, 1.5),
        (-1.0, 0.5, 0.8, 0.0),
        (-1.0, 5.0, 3.0, 0.0),  # dual clip
    ],
)
def test_clipped_loss(advantage: float, ratio: float, loss: float, gradient: float) -> None:
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    value = policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, 1, 0.2, 3.0)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    # d loss / d log pi = d loss / d ratio * ratio.
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_importance_weights_scale_the_loss_and_are_truncated() -> None:
    weights = truncated_importance_weights(torch.tensor([0.1, -0.2, 1.5]), torch.zeros(3), cap=2.0)
    assert weights.tolist() == pytest.approx([1.105171, 0.818731, 2.0], abs=1e-6)
    mask = torch.ones(1, 3, dtype=torch.bool)
    zeros, ones = torch.zeros(1, 3), torch.ones(1, 3)
    loss = policy_loss(zeros, zeros, ones, mask, 3, 0.2, 3.0, weights[None])
    assert loss.item() == pytest.approx(-(1.105171 + 0.818731 + 2) / 3, abs=1e-6)


def test_masked_positions_have_no_value_and_no_gradient() -> None:
    logprobs = torch.tensor([[0.0, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    bad = torch.tensor([[1.0, torch.inf]])
    loss = policy_loss(logprobs, torch.zeros(1, 2), bad, mask, 1, 0.2, 3.0)
    loss.backward()
    assert loss.item() == -1.0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


def test_micro_batches_add_up_to_the_token_mean() -> None:
    # Losses 1 and 3 in one micro-batch, 5 in the other: 3.0, where the mean of means is 3.5.
    losses = torch.tensor([[1.0, 3.0], [5.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    zeros = torch.zeros(1, 2)
    total = sum(policy_loss(zeros, zeros, -losses[i : i + 1], mask[i : i + 1], 3, 0.2, 3.0).item() for i in range(2))
    assert total == pytest.approx(3.0, abs=1e-6)


def test_value_loss_takes_the_worse_of_unclipped_and_clipped() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)

    def loss(value: float, old: float, target: float) -> float:
        tensors = (torch.tensor([[x]]) for x in (value, old, target))
        return value_loss(*tensors, mask, 1, 0.2).item()

    assert loss(1.0, 0.9, 2.0) == pytest.approx(0.5, abs=1e-6)  # inside the clip: (1 - 2)^2 / 2
    assert loss(1.5, 0.0, 2.0) == pytest.approx(1.62, abs=1e-6)  # clipped to 0.2: (0.2 - 2)^2 / 2
    assert loss(-1.0, 0.0, 2.0) == pytest.approx(4.5, abs=1e-6)  # the unclipped one is worse


def test_mismatch_figures() -> None:
    old = torch.tensor([[0.1, -0.2, 0.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    gap = mismatch(old, torch.zeros(1, 4), mask)
    assert gap.rms == pytest.approx(0.129099, abs=1e-6)
    assert gap.kl == pytest.approx((0.105171 - 0.1 + 0.818731 - 1 + 0.2) / 3, abs=1e-6)
    assert gap.effective_share == pytest.approx(0.985480, abs=1e-5)
    assert gap.outside == pytest.approx(2 / 3, abs=1e-6)


def test_adam_steps_bfloat16_through_a_master_copy() -> None:
    weight = nn.Parameter(torch.tensor([256.0], dtype=torch.bfloat16))
    optimizer = Adam([([weight], 0.25)], 1e-8)
    for _ in range(8):  # Each step alone would be rounded away: bfloat16 near 256 counts in twos.
        weight.grad = torch.ones_like(weight)
        optimizer.step(1.0)
    assert weight.item() == 254.0


def test_a_gradient_that_is_not_finite_makes_no_update() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = Adam([([weight], 0.1)], 1e-8)
    weight.grad = torch.tensor([torch.nan])
    with pytest.raises(FloatingPointError):
        optimizer.step(1.0)
    assert weight.item() == 1.0


ARMS = 3


class Bandit:
    """One state, three actions, one token: every action once, drawn (so to say) uniformly by the engine, and put right
    by importance weights. Exact: no sampling noise."""

    reference = torch.tensor([0.5, 0.3, 0.2])
    scores = torch.tensor([0.0, 1.0, 2.0])

    def __init__(self) -> None:
        self.logits = nn.Parameter(self.reference.log().clone())
        self.critic = Critic(torch.zeros(1))
        self.tokens = Tokens(
            input_ids=torch.zeros(ARMS, 2, dtype=torch.long),
            prompt_lengths=torch.ones(ARMS, dtype=torch.long),
            response_ids=torch.arange(ARMS)[:, None],
            response_mask=torch.ones(ARMS, 1, dtype=torch.bool),
        )

    def logprobs_of(self, tokens: Tokens) -> torch.Tensor:
        return self.logits.log_softmax(0)[tokens.response_ids]

    def train(self, kl_coef: float, updates: int) -> torch.Tensor:
        settings = PPOSettings(
            epochs=4,
            minibatches=1,
            vf_coef=1.0,
            value_clip=10.0,
            importance_cap=100.0,
            max_grad_norm=100.0,
            approx_kl_stop=1.0,
        )
        optimizer = Adam([([self.logits], 0.02), (list(self.critic.parameters()), 0.02)], 1e-5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(updates):
            with torch.no_grad():
                old = self.logprobs_of(self.tokens)
                values = self.critic(torch.zeros(ARMS, 1, 1))
            mask = self.tokens.response_mask
            rewards = shape_rewards(self.scores, old, self.reference.log()[:, None], mask, kl_coef)
            advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
            uniform = torch.full((ARMS, 1), 1 / ARMS).log()
            # The critic has to fit the expectation under pi, not over actions: give it that return.
            returns = (old.exp() * returns).sum().expand(ARMS, 1)
            prefix = torch.zeros(ARMS, 1, 1)
            batch = ValuedExperience(self.tokens, old, uniform, advantages, prefix, values, returns)
            passes = draw_minibatches(self.tokens, settings.epochs, settings.minibatches, generator)
            ppo_update(self.logprobs_of, self.critic, optimizer, batch, settings, passes, 2 * ARMS, sharing=True)
        return self.logits.detach().softmax(0)


@pytest.mark.parametrize(
    ("kl_coef", "optimum", "objective", "score", "kl"),
    [
        (1.0, (0.179000, 0.291944, 0.529056), 1.027222, 1.350056, 0.322834),
        (0.5, (0.036667, 0.162559, 0.800774), 1.306369, 1.764107, 0.915475),
    ],
)
def test_the_loop_converges_to_the_closed_form(kl_coef, optimum, objective, score, kl) -> None:  # type: ignore[no-untyped-def]
    bandit = Bandit()
    pi = bandit.train(kl_coef, updates=400)
    assert pi.tolist() == pytest.approx(optimum, abs=2e-3)
    found_kl = (pi * (pi / bandit.reference).log()).sum().item()
    found_score = (pi * bandit.scores).sum().item()
    assert found_score == pytest.approx(score, abs=5e-3)
    assert found_kl == pytest.approx(kl, abs=1e-2)
    # Flat at the optimum, so the objective is met far more closely than the parameters.
    assert found_score - kl_coef * found_kl == pytest.approx(objective, abs=1e-4)
    assert bandit.critic.bias.item() == pytest.approx(objective, abs=2e-2)

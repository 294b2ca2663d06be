"""KL estimators, rewards, GAE, whitening and the KL controller, against literals."""

import pytest
import torch

from learner.improve.policy_gradient import adapt_kl_coef
from learner.improve.ppo.advantages import gae, last_token, shape_rewards, whiten
from learner.model.kl import kl_k1, kl_k3, masked_mean

P, Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(("estimator", "expected"), [(kl_k1, 0.025267), (kl_k3, 0.025267)])
def test_kl_estimators_in_expectation(estimator, expected) -> None:  # type: ignore[no-untyped-def]
    assert (P * estimator(P.log(), Q.log())).sum().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(kl_k1, (0, 0, 0)), (kl_k3, (0.1, -0.1, 0))],
)
def test_expected_gradient_of_each_as_a_loss(estimator, expected) -> None:  # type: ignore[no-untyped-def]
    logits = P.log().requires_grad_()
    loss = (P * estimator(logits.log_softmax(0), Q.log())).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.tolist() == pytest.approx(expected, abs=1e-6)


def test_last_token_comes_from_the_mask() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    assert last_token(mask).tolist() == [2, 0, 1]


def test_rewards_are_the_kl_of_each_token_and_the_score_on_the_last() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, torch.nan]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, -3.0], [-2.0, -0.5, torch.inf]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards = shape_rewards(torch.tensor([1.0, -2.0]), logprobs, ref_logprobs, mask, 0.1)
    assert rewards[0].tolist() == pytest.approx([-0.05, 0.1, 1.0], abs=1e-6)
    assert rewards[1].tolist() == pytest.approx([-0.1, -1.95, 0.0], abs=1e-6)


def test_rewards_carry_no_gradient() -> None:
    logprobs = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert not shape_rewards(torch.ones(1), logprobs, torch.ones(1, 2), mask, 0.1).requires_grad


def _gae(rewards, values, gamma, gae_lambda):  # type: ignore[no-untyped-def]
    shape = torch.tensor([rewards]), torch.tensor([values]), torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(*shape, gamma, gae_lambda)
    return advantages[0].tolist(), returns[0].tolist()


def test_gae_literals() -> None:
    advantages, returns = _gae([0.0, 0, 1], [0.5, 0.6, 0.7], 1, 0.95)
    assert advantages == pytest.approx([0.46575, 0.385, 0.3], abs=1e-6)
    assert returns == pytest.approx([0.96575, 0.985, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("gamma", "gae_lambda", "expected"),
    [(1, 1, [6, 5, 3]), (0.5, 1, [2.75, 3.5, 3]), (1, 0.5, [3.625, 4.25, 3])],
)
def test_gae_returns(gamma, gae_lambda, expected) -> None:  # type: ignore[no-untyped-def]
    assert _gae([1.0, 2, 3], [0.5, 1, 1.5], gamma, gae_lambda)[1] == pytest.approx(expected, abs=1e-6)


def test_gae_ends_at_each_rows_own_end() -> None:
    rewards = torch.tensor([[0.0, 0, 1, 9], [0.0, 0, 1, 0]])
    values = torch.tensor([[0.5, 0.6, 0.7, torch.nan], [0.5, 0.6, 0.7, 5]])
    mask = torch.tensor([[True, True, True, False]] * 2)
    advantages, returns = gae(rewards, values, mask, 1, 0.95)
    for row in range(2):
        assert advantages[row].tolist() == pytest.approx([0.46575, 0.385, 0.3, 0], abs=1e-6)
        assert returns[row].tolist() == pytest.approx([0.96575, 0.985, 1, 0], abs=1e-6)


def test_whitening_uses_the_whole_batch_and_ignores_what_is_masked() -> None:
    x = torch.tensor([[1.0, 3.0], [5.0, torch.nan]])
    mask = torch.tensor([[True, True], [True, False]])
    white = whiten(x, mask)
    # Mean 3, population sd sqrt(8/3) = 1.632993.
    assert white.flatten().tolist() == pytest.approx([-1.224745, 0, 1.224745, 0], abs=1e-5)


def test_token_mean_is_not_the_mean_of_means() -> None:
    x = torch.tensor([[1.0, 3.0], [5.0, 99.0]])
    assert masked_mean(x, torch.tensor([[True, True], [True, False]])).item() == 3.0


def test_adaptive_kl_coef() -> None:
    assert adapt_kl_coef(0.2, kl=0.2, target=0.1, horizon=100, n=10) == pytest.approx(0.204, abs=1e-9)
    assert adapt_kl_coef(0.2, kl=12, target=6, horizon=10_000, n=256) == pytest.approx(0.201024, abs=1e-9)
    assert adapt_kl_coef(0.2, kl=0.0, target=6, horizon=100, n=10) == pytest.approx(0.196, abs=1e-9)

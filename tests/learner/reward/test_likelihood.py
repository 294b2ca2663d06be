"""The likelihood of every kind of vote, against literals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.reward.likelihood import (
    BOTH_BAD,
    TIE,
    A,
    B,
    choice_log_probs,
    choice_loss,
    preference_loss,
    rao_kupper_log_probs,
    thumb_loss,
)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_preference_loss_literals() -> None:
    losses = preference_loss(t(0, 0.6, -0.6, 2, -2, -800))
    assert losses.tolist() == pytest.approx([0.693147, 0.437488, 1.037488, 0.126928, 2.126928, 800.0], abs=1e-6)
    assert losses[-1].item() == 800.0


def test_preference_loss_of_scaled_differences() -> None:
    # DPO's loss at beta 0.1 and logits (0, 10, 20) is the same function.
    assert preference_loss(0.1 * t(0, 10, 20)).tolist() == pytest.approx([0.693147, 0.313262, 0.126928], abs=1e-6)


def test_preference_loss_gradient() -> None:
    delta = t(0.6).requires_grad_()
    preference_loss(delta).sum().backward()
    assert delta.grad is not None
    assert delta.grad.item() == pytest.approx(-0.354344, abs=1e-6)


def test_label_smoothing() -> None:
    assert preference_loss(t(0.6), label_smoothing=0.1).item() == pytest.approx(0.497488, abs=1e-6)


def test_rao_kupper_literals() -> None:
    probabilities = [p.exp().item() for p in rao_kupper_log_probs(t(0.6), t(0.5))]
    assert probabilities == pytest.approx([0.524979, 0.249740, 0.225281], abs=1e-6)


def test_rao_kupper_is_finite_in_the_tails() -> None:
    for log_prob in rao_kupper_log_probs(t(-800, 800), t(0.5, 0.5)):
        assert torch.isfinite(log_prob).all()


def test_outcomes_sum_to_one_and_bad_answers_are_called_bad() -> None:
    log_probs = choice_log_probs(t(0.3, -4), t(-0.1, -4), t(0.2, 0), t(0.5, 0.5), t(-1, -1))
    assert log_probs.exp().sum(dim=-1).tolist() == pytest.approx([1, 1], abs=1e-12)
    # Delta = 0.3 + 0.1 + 0.2 = 0.6 as above; the rest splits by q = sigmoid(-1 - 0.1) = 0.249740.
    assert log_probs[0].exp().tolist() == pytest.approx([0.524979, 0.249740, 0.169019, 0.056262], abs=1e-6)
    assert log_probs[1, BOTH_BAD] > log_probs[1, TIE]


def test_choice_loss_picks_the_outcome_and_smooths_winners_only() -> None:
    log_probs = t(0.5, 0.2, 0.2, 0.1).log().expand(4, 4)
    outcome = torch.tensor([A, B, TIE, BOTH_BAD])
    assert choice_loss(log_probs, outcome).tolist() == pytest.approx([0.693147, 1.609438, 1.609438, 2.302585], abs=1e-6)
    smoothed = choice_loss(log_probs, outcome, 0.1).tolist()
    assert smoothed == pytest.approx([0.784776, 1.517809, 1.609438, 2.302585], abs=1e-6)


def test_thumb_loss() -> None:
    # Bar 0.4: a score of 1 clears it by 0.6.
    assert thumb_loss(t(1.0), t(0.4), t(1)).item() == pytest.approx(0.437488, abs=1e-6)
    assert thumb_loss(t(1.0), t(0.4), t(-1)).item() == pytest.approx(1.037488, abs=1e-6)


def test_the_probability_of_a_thumb() -> None:
    # 0.15 above the bar; KTO's losses of a desirable and an undesirable answer are the other thumb's probability.
    up, down = ((-thumb_loss(t(0.55), t(0.4), t(thumb))).exp().item() for thumb in (1, -1))
    assert (up, down) == pytest.approx((0.537430, 0.462570), abs=1e-6)


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_thumbs_bound_pairs(a: float, b: float) -> None:
    pair = preference_loss(t(a - b)).item()
    assert pair <= preference_loss(t(a)).item() + preference_loss(t(-b)).item() + 1e-9

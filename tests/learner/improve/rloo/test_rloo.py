"""RLOO's advantages against literals, and its update against a bandit's closed form."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from learner.improve.adam import Adam
from learner.improve.base import ExperienceSource
from learner.improve.policy_gradient import Experience, draw_minibatches, update_policy
from learner.improve.rloo.trainer import leave_one_out, repeated
from learner.improve_settings import RLOOSettings
from learner.model.forward import Tokens
from server.store.chats.records import Prompt


def test_each_reward_is_compared_with_the_mean_of_the_others() -> None:
    scores, kl = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([2.0, 0.0, -1.0, 4.0])
    assert leave_one_out(scores, 4).tolist() == pytest.approx([-2.666667, -1.333333, 0.0, 4.0], abs=1e-6)
    assert leave_one_out(scores - 0.5 * kl, 4).tolist() == pytest.approx([-3.166667, -0.5, 1.5, 2.166667], abs=1e-6)
    # Two prompts with two answers each.
    assert leave_one_out(torch.tensor([1.0, 3.0, 10.0, 10.0]), 2).tolist() == [-2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(("answers", "said"), [(1, "greater than or equal to 2"), (5, "a multiple of answers")])
def test_a_batch_has_several_answers_to_each_of_its_prompts(answers: int, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RLOOSettings(episodes=8, answers=answers)


def test_the_answers_to_a_prompt_are_in_a_row() -> None:
    prompts = [Prompt(f"c{number}", [number], 8) for number in range(4)]
    source = ExperienceSource(None, prompts, 0.85, 0)  # type: ignore[arg-type]
    batches = repeated(source, RLOOSettings(episodes=6, answers=3))
    first, second = ([prompt.token_ids[0] for prompt in next(batches)] for _ in range(2))
    assert first == [first[0]] * 3 + [first[3]] * 3
    assert sorted({*first, *second}) == [0, 1, 2, 3]


class Bandit:
    """One state, three actions, one token: every pair of actions once, drawn (so to say) uniformly by the engine, and
    put right by importance weights. Exact: no sampling noise."""

    reference = torch.tensor([0.5, 0.3, 0.2])
    scores = torch.tensor([0.0, 1.0, 2.0])

    def __init__(self) -> None:
        self.logits = nn.Parameter(self.reference.log().clone())
        actions = torch.cartesian_prod(torch.arange(3), torch.arange(3)).flatten()
        rows = len(actions)
        self.tokens = Tokens(
            input_ids=torch.zeros(rows, 2, dtype=torch.long),
            prompt_lengths=torch.ones(rows, dtype=torch.long),
            response_ids=actions[:, None],
            response_mask=torch.ones(rows, 1, dtype=torch.bool),
        )

    def logprobs_of(self, tokens: Tokens) -> torch.Tensor:
        return self.logits.log_softmax(0)[tokens.response_ids]

    def train(self, kl_coef: float, updates: int) -> torch.Tensor:
        settings = RLOOSettings(
            epochs=2, minibatches=1, importance_cap=100.0, max_grad_norm=100.0, approx_kl_stop=1.0, answers=2
        )
        optimizer = Adam([([self.logits], 0.02)], 1e-5)
        generator = torch.Generator().manual_seed(0)
        uniform = torch.full(self.tokens.response_ids.shape, 1 / 3).log()
        for _ in range(updates):
            with torch.no_grad():
                old = self.logprobs_of(self.tokens)
            kl = (old - self.reference.log()[self.tokens.response_ids]).sum(dim=1)
            rewards = self.scores[self.tokens.response_ids[:, 0]] - kl_coef * kl
            batch = Experience(self.tokens, old, uniform, leave_one_out(rewards, 2)[:, None])
            passes = draw_minibatches(self.tokens, settings.epochs, settings.minibatches, generator)
            update_policy(self.logprobs_of, optimizer, batch, settings, passes, 1000, sharing=False)
        return self.logits.detach().softmax(0)


@pytest.mark.parametrize(
    ("kl_coef", "optimum"), [(1.0, [0.179000, 0.291944, 0.529056]), (0.5, [0.036667, 0.162559, 0.800774])]
)
def test_it_reaches_the_optimum_of_a_bandit(kl_coef: float, optimum: list[float]) -> None:
    """pi_ref exp(score / kl_coef), normalised (RLHF with a KL penalty in closed form)."""
    found = Bandit().train(kl_coef, updates=400)
    assert found.tolist() == pytest.approx(optimum, abs=2e-3)

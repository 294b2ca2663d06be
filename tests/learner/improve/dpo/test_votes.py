"""DPO's loss against literals, and on a bandit against the closed form."""

from collections.abc import Sequence

import pytest
import torch

from learner.improve.adam import Adam
from learner.improve.dpo.votes import WeighedVotes, batches, implicit_rewards, penalty, trained
from learner.reward.dataset import Dataset
from learner.reward.likelihood import TIE, A, B, preference_loss
from learner.reward.linear_heads import VoteTensors, start


def choices(
    a: list[int], b: list[int], outcome: list[int], thumbs: Sequence[tuple[int, float, int]] = ()
) -> VoteTensors:
    """Choices between these answers, of one conversation each, and thumbs: answer, thumb and user."""
    count, more = len(a), len(thumbs)
    return VoteTensors(
        a=torch.tensor(a, dtype=torch.long),
        b=torch.tensor(b, dtype=torch.long),
        outcome=torch.tensor(outcome, dtype=torch.long),
        temperature_difference=torch.zeros(count),
        choice_weight=torch.ones(count),
        choice_group=torch.arange(count),
        response=torch.tensor([row for row, _, _ in thumbs], dtype=torch.long),
        thumb=torch.tensor([thumb for _, thumb, _ in thumbs]),
        user=torch.tensor([user for _, _, user in thumbs], dtype=torch.long),
        thumb_weight=torch.ones(more),
        thumb_group=count + torch.arange(more),
        users=2,
    )


def weighed(votes: VoteTensors, answers: int, smoothing: float = 0.0) -> WeighedVotes:
    shown = [([5], [number]) for number in range(answers)]
    each = torch.full((len(votes.a),), smoothing), torch.full((len(votes.thumb),), smoothing)
    return WeighedVotes(shown, votes, *each, torch.zeros(answers))


@pytest.mark.parametrize(
    ("logprobs", "reference", "delta", "loss", "gradient", "smoothed"),
    [
        ((-12.0, -14.0), (-15.0, -13.0), 0.4, 0.513015, -0.040131, 0.553015),
        ((-20.0, -14.0), (-11.0, -13.0), -0.8, 1.171101, -0.068997, 1.091101),
    ],
)
def test_the_loss_of_a_pair(
    logprobs: tuple[float, float],
    reference: tuple[float, float],
    delta: float,
    loss: float,
    gradient: float,
    smoothed: float,
) -> None:
    policy = torch.tensor(logprobs, requires_grad=True)
    won, lost = implicit_rewards(policy, torch.tensor(reference), beta=0.1)
    assert (won - lost).item() == pytest.approx(delta, abs=1e-6)
    found = preference_loss(won - lost)
    found.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([gradient, -gradient], abs=1e-6)
    assert preference_loss(won - lost, 0.1).item() == pytest.approx(smoothed, abs=1e-6)


def test_every_kind_of_vote_has_the_loss_of_the_joint_likelihood() -> None:
    """Implicit rewards +.2 and -.2, ties of width a half."""
    rewards, heads = torch.tensor([0.2, -0.2]), start(1, 0, 2, torch.zeros(1))
    losses = [weighed(choices([0], [1], [said]), 2).loss(heads, rewards, 1.0).item() for said in (A, B)]
    assert losses == pytest.approx([0.744397, 1.241154], abs=1e-6)
    heads.bad_bar.fill_(-0.3)
    tie, bad = (weighed(choices([0], [1], [said]), 2).loss(heads, rewards, 1.0) for said in (TIE, 3))
    assert [(-tie).exp().item(), (-bad).exp().item()] == pytest.approx([0.135527, 0.100401], abs=1e-6)
    heads.thumb_bar.fill_(0.05)
    up, down = (weighed(choices([], [], [], [(0, thumb, 1)]), 2).loss(heads, rewards, 1.0) for thumb in (1.0, -1.0))
    assert [up.item(), down.item()] == pytest.approx([0.620957, 0.770957], abs=1e-6)
    # One mean over all votes, and each vote's own smoothing.
    both = weighed(choices([0], [1], [A], [(0, 1.0, 1)]), 2)
    assert both.loss(heads, rewards, 2.0).item() == pytest.approx((0.744397 + 0.620957) / 2, abs=1e-6)


def test_the_reward_of_a_long_answer_may_be_taken_per_token() -> None:
    rewards = implicit_rewards(
        torch.tensor([-10.0, -40.0]), torch.tensor([-12.0, -48.0]), 0.1, torch.tensor([2.5, 0.5])
    )
    assert rewards.tolist() == pytest.approx([0.5, 0.4], abs=1e-6)


def test_votes_of_unreliable_voters_are_smoothed_up_to_a_half() -> None:
    votes = choices([0, 2, 4], [1, 3, 5], [A, B, A], [(6, 1.0, 0), (1, -1.0, 1)])
    answers = [([9], [number]) for number in range(7)]
    dataset = Dataset(
        answers, votes, list("abcde"), torch.tensor([False, True, False, False, False]), list("12345"),
        ["reliable", "doubted"], torch.tensor([0, 0, 1, 0, 1]), torch.ones(3, dtype=torch.bool),
        torch.tensor([1.0, 0.2]), torch.zeros(5, dtype=torch.bool),
    )  # fmt: skip
    found = WeighedVotes.of(dataset, 0.1)
    # The second conversation judges, so nothing trains on answers 2 and 3.
    assert [answer for _, [answer] in found.answers] == [0, 1, 4, 5, 6]
    assert (found.votes.a.tolist(), found.votes.b.tolist(), found.votes.response.tolist()) == ([0, 2], [1, 3], [4, 1])
    assert found.choice_smoothing.tolist() == pytest.approx([0.1, 0.42])
    assert found.thumb_smoothing.tolist() == pytest.approx([0.1, 0.42])


def test_some_of_the_votes_keep_what_belongs_to_them() -> None:
    votes = choices([0, 2, 4], [1, 3, 5], [A, B, TIE], [(6, 1.0, 0), (1, -1.0, 1)])
    found = WeighedVotes(
        [([9], [number]) for number in range(7)], votes,
        torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5]), torch.arange(7.0),
    )[torch.tensor([1, 4])]  # fmt: skip
    assert [answer for _, [answer] in found.answers] == [1, 2, 3]
    assert found.ref_logprobs.tolist() == [1.0, 2.0, 3.0]
    assert (found.votes.a.tolist(), found.votes.b.tolist(), found.votes.outcome.tolist()) == ([1], [2], [B])
    assert (found.votes.response.tolist(), found.votes.thumb.tolist()) == ([0], [-1.0])
    assert [*found.choice_smoothing.tolist(), *found.thumb_smoothing.tolist()] == pytest.approx([0.2, 0.5])
    assert found.weight == 2.0


def test_micro_batches_hold_whole_votes_within_the_budget() -> None:
    sizes = torch.tensor([[2, 10], [1, 4], [2, 30], [2, 4], [2, 10]])
    assert [numbers.tolist() for numbers in batches(sizes, 24)] == [[1, 3], [0], [4], [2]]
    assert [numbers.tolist() for numbers in batches(sizes, 60)] == [[1, 3, 0], [4], [2]]


def test_it_reaches_the_optimum_of_a_bandit() -> None:
    """With votes as a Bradley-Terry model of the score gives them, DPO has PPO's optimum."""
    reference, scores = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 2.0])
    for beta, optimum in ((1.0, [0.179000, 0.291944, 0.529056]), (0.5, [0.036667, 0.162559, 0.800774])):
        logits = reference.log().clone().requires_grad_()
        optimizer = Adam([([logits], 0.02)], 1e-8)  # type: ignore[list-item]
        losses = []
        for _ in range(600):
            rewards = implicit_rewards(logits.log_softmax(0), reference.log(), beta)
            loss = torch.stack(
                [
                    preference_loss(rewards[one] - rewards[other], torch.sigmoid(scores[other] - scores[one]))
                    for one, other in ((0, 1), (0, 2), (1, 2))
                ]
            ).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step(100.0)
            losses.append(loss.item())
        assert logits.detach().softmax(0).tolist() == pytest.approx(optimum, abs=1e-3)
        if beta == 1.0:
            assert (losses[0], losses[-1]) == pytest.approx((0.693147, 0.509913), abs=1e-5)


def test_ties_and_bars_are_learned_beside_the_policy() -> None:
    heads = trained(start(1, 0, 2, torch.zeros(1)))
    votes = weighed(choices([0], [1], [TIE], [(0, 1.0, 1)]), 2)
    (votes.loss(heads, torch.zeros(2), votes.weight) + penalty(heads, 100.0)).backward()  # type: ignore[no-untyped-call]
    assert not heads.weights.requires_grad
    for name in ("log_eta", "bad_bar", "thumb_bar", "user_bars"):
        gradient = getattr(heads, name).grad
        assert gradient is not None, name
        assert gradient.abs().max() > 1e-3, name
    assert heads.user_bars.grad[0, 0].item() == 0.0

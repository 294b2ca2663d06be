"""The votes that DPO trains on, and their loss given implicit rewards. Pure torch.

The implicit reward of an answer is beta (log pi - log pi_ref): what a policy says about the reward that it is optimal
for (Rafailov et al. 2023). It takes the place of the score in the likelihood of all kinds of votes
(`learner.reward.likelihood`), so ties, both-bad and thumbs count as in the fit of the reward model.

Letters: N answers, C choices, M thumbs.
"""

import hashlib
import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from learner.model.features import TokenPair
from learner.reward.dataset import Dataset
from learner.reward.linear_heads import Heads, VoteTensors, prior, vote_loss


@dataclass(frozen=True)
class WeighedVotes:
    """Votes on `answers`, with the label smoothing of each, (C,) and (M,), and log pi_ref of each answer, (N,)."""

    answers: list[TokenPair]
    votes: VoteTensors
    choice_smoothing: Tensor
    thumb_smoothing: Tensor
    ref_logprobs: Tensor

    @classmethod
    def of(cls, dataset: Dataset, label_smoothing: float) -> "WeighedVotes":
        """The training votes of a dataset, before the reference has read their answers. Votes of an unreliable voter
        are assumed to be wrong more often, up to a half; their weight is lower, too."""
        rows, votes = dataset.train.on_voted()
        doubt = 1 - dataset.reliability[dataset.voters[~dataset.judging]]
        smoothing = label_smoothing + (0.5 - label_smoothing) * doubt
        choices, thumbs = smoothing.split([len(votes.a), len(votes.thumb)])
        return cls([dataset.answers[row] for row in rows.tolist()], votes, choices, thumbs, torch.zeros(len(rows)))

    def __len__(self) -> int:
        return len(self.votes)

    def __getitem__(self, numbers: Tensor) -> "WeighedVotes":
        """The votes with these numbers, of which the first C are choices, and the answers that they are on."""
        count = len(self.votes.a)
        choices, thumbs = numbers[numbers < count], numbers[numbers >= count] - count
        rows, votes = self.votes.at(choices, thumbs).on_voted()
        answers = [self.answers[row] for row in rows.tolist()]
        smoothing = self.choice_smoothing[choices], self.thumb_smoothing[thumbs]
        return WeighedVotes(answers, votes, *smoothing, self.ref_logprobs[rows])

    @property
    def weight(self) -> float:
        """The sum of the votes' weights; never zero, though all voters may be unreliable."""
        return max(float(self.votes.choice_weight.sum() + self.votes.thumb_weight.sum()), 1e-6)

    @property
    def digest(self) -> str:
        """Differs for other votes, other answers, or the same in another order."""
        votes = self.votes
        columns = (votes.a, votes.b, votes.outcome, votes.response, votes.thumb, votes.user)
        said = [self.answers, [column.tolist() for column in columns], votes.users]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each answer."""
        return torch.tensor([len(answer) for _, answer in self.answers])

    @property
    def sizes(self) -> Tensor:
        """(C + M, 2) the answers of each vote, and the tokens of the longest of them with its prompt."""
        lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in self.answers])
        pairs = torch.maximum(lengths[self.votes.a], lengths[self.votes.b])
        answers = torch.tensor([2] * len(self.votes.a) + [1] * len(self.votes.thumb))
        return torch.stack([answers, torch.cat([pairs, lengths[self.votes.response]])], dim=1)

    def loss(self, heads: Heads, rewards: Tensor, weight: float) -> Tensor:
        """The sum of the votes' losses divided by `weight`, given the implicit rewards (N,) of the answers."""
        votes, smoothing = self.votes, (self.choice_smoothing, self.thumb_smoothing)
        return (
            vote_loss(heads, rewards[None], votes, votes.choice_weight, votes.thumb_weight, *smoothing).sum() / weight
        )


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float, share: Tensor | float = 1.0) -> Tensor:
    """beta (log pi - log pi_ref), (N,), of whole answers, times `share` of it; any gradient is the policy's."""
    return beta * share * (logprobs - ref_logprobs)


def batches(sizes: Tensor, budget: int) -> list[Tensor]:
    """Numbers of votes in micro-batches of similar length: each has at most `budget` tokens, including padding, or one
    vote, which may have more. `sizes` (V, 2) are each vote's answers and the tokens of the longest."""
    found: list[list[int]] = [[]]
    answers = 0
    for number in sizes[:, 1].argsort(stable=True).tolist():
        more, length = sizes[number].tolist()
        if found[-1] and (answers + more) * length > budget:
            found.append([])
            answers = 0
        found[-1].append(number)
        answers += more
    return [torch.tensor(numbers) for numbers in found]


def penalty(heads: Heads, weight: float) -> Tensor:
    """The prior of what the likelihood has beside the rewards, as a share of votes that weigh `weight` together."""
    return prior(heads).sum() / weight


def trained(heads: Heads) -> Heads:
    """The same with gradients for all but the weights, which there are none of."""
    return replace(heads, **{name: nn.Parameter(value) for name, value in vars(heads).items() if name != "weights"})

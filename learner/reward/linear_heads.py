"""Linear heads on frozen features, many fitted at once. Pure torch.

A head is fitted by penalised maximum likelihood (`learner.reward.likelihood`). It lies in the span of the answers it
was fitted on, so fits run in that span's coordinates (`span_basis`): a few hundred numbers instead of thousands, and
exactly the same optimum. Folds, penalties and bootstraps are independent rows of one problem, and L-BFGS on their sum
costs little more than on one.

The temperature difference of the two answers is a nuisance covariate: the fit may explain votes by it, but scores
exclude it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.model.features import FeatureSpec
from learner.reward import likelihood
from learner.reward.standardiser import standardiser, usual_mix

LOG_HALF = -0.693147


@dataclass(frozen=True)
class VoteTensors:
    """Votes as indices into N responses: C choices and M thumbs."""

    # Choices, all (C,): rows of the two responses, outcome (A, B, TIE, BOTH_BAD), temperature of a minus that of b.
    a: Tensor
    b: Tensor
    outcome: Tensor
    temperature_difference: Tensor
    choice_weight: Tensor
    # Conversations as integers: cross-validation and bootstrap keep their votes together.
    choice_group: Tensor
    # Thumbs, all (M,): row of the response, +1.0 or -1.0, user as an integer.
    response: Tensor
    thumb: Tensor
    user: Tensor
    thumb_weight: Tensor
    thumb_group: Tensor
    users: int

    def __len__(self) -> int:
        return len(self.a) + len(self.thumb)

    def at(self, choices: Tensor, thumbs: Tensor) -> "VoteTensors":
        """Some choices and some thumbs, each as indices or as a mask."""
        return replace(
            self,
            a=self.a[choices],
            b=self.b[choices],
            outcome=self.outcome[choices],
            temperature_difference=self.temperature_difference[choices],
            choice_weight=self.choice_weight[choices],
            choice_group=self.choice_group[choices],
            response=self.response[thumbs],
            thumb=self.thumb[thumbs],
            user=self.user[thumbs],
            thumb_weight=self.thumb_weight[thumbs],
            thumb_group=self.thumb_group[thumbs],
        )

    def on_voted(self) -> tuple[Tensor, "VoteTensors"]:
        """The rows (D,) of the responses that were voted on, ascending, and these votes as indices into them."""
        rows = torch.cat([self.a, self.b, self.response]).unique()
        a, b, response = (torch.searchsorted(rows, index) for index in (self.a, self.b, self.response))
        return rows, replace(self, a=a, b=b, response=response)

    def voted(self, features: Tensor) -> tuple[Tensor, "VoteTensors"]:
        """Features (D, F), out of (N, F), of each response that was voted on, and these votes as indices into them. A
        fit scores every response that it is given, so the others would only cost time."""
        rows, votes = self.on_voted()
        return features[rows], votes

    @property
    def groups(self) -> int:
        """One more than the highest conversation number."""
        return int(torch.cat([self.choice_group, self.thumb_group]).max()) + 1 if len(self) else 0


@dataclass(frozen=True)
class Heads:
    """K heads over F features, and the other parameters of the likelihood. The first axis is K everywhere."""

    weights: Tensor  # (K, F)
    temperature: Tensor  # (K,) effect of one unit of temperature difference on a choice
    log_eta: Tensor  # (K,) width of a tie
    bad_bar: Tensor  # (K,)
    thumb_bar: Tensor  # (K,)
    user_bars: Tensor  # (K, U) offsets from thumb_bar

    def eta(self) -> Tensor:
        """(K,) bounded, so that it stays finite if a line search tries a far step."""
        return self.log_eta.clamp(-6.0, 3.0).exp()

    def scores(self, features: Tensor) -> Tensor:
        """(K, N) scores of features (N, F)."""
        return torch.matmul(self.weights, features.mT)

    def bars(self, votes: VoteTensors) -> Tensor:
        """(K, M) the bar of each thumb's user."""
        return self.thumb_bar[:, None] + self.user_bars[:, votes.user]

    def choice_log_probs(self, scores: Tensor, votes: VoteTensors) -> Tensor:
        """(K, C, 4) log-probabilities of each choice's possible outcomes, from scores (K, N)."""
        return likelihood.choice_log_probs(
            scores[:, votes.a],
            scores[:, votes.b],
            self.temperature[:, None] * votes.temperature_difference,
            self.eta()[:, None],
            self.bad_bar[:, None],
        )


def span_basis(features: Tensor) -> Tensor:
    """(D, F) orthonormal directions that have the span of features (N, D), F = min(N, D). A ridge-penalised linear fit
    on `features @ basis` has the same scores as one on `features`."""
    # Eigenvectors would do as well, but their algorithms fail on some matrices with features that are always zero.
    basis: Tensor = torch.linalg.qr(features.mT).Q
    return basis


def reduced(features: Tensor, votes: VoteTensors, spec: FeatureSpec) -> tuple[Tensor, VoteTensors]:
    """Standardised features of the answers that were voted on, in the coordinates of their span, (D, P) out of (N, F),
    and these votes as indices into them: for fits that nothing is kept of. `spec` is what features are
    made of."""
    voted, votes = votes.voted(features)
    standard = standardiser(voted, spec, usual_mix(spec))(voted)
    return standard @ span_basis(standard), votes


def objective(
    heads: Heads,
    features: Tensor,
    votes: VoteTensors,
    l2: Tensor,
    label_smoothing: float,
    choice_weight: Tensor,
    thumb_weight: Tensor,
) -> Tensor:
    """(K,) penalised negative log-likelihoods. Weights are (K, C) and (K, M), `l2` (K,)."""
    scores, penalty = heads.scores(features), 0.5 * l2 * heads.weights.square().sum(dim=1)
    losses = vote_loss(heads, scores, votes, choice_weight, thumb_weight, label_smoothing, label_smoothing)
    return penalty + losses + prior(heads)


def vote_loss(
    heads: Heads,
    scores: Tensor,
    votes: VoteTensors,
    choice_weight: Tensor,
    thumb_weight: Tensor,
    choice_smoothing: Tensor | float,
    thumb_smoothing: Tensor | float,
) -> Tensor:
    """(K,) sums of the votes' weighted losses, given scores (K, N) of the answers. The smoothing is the label smoothing
    of all votes, or of each, (C,) and (M,)."""
    loss = scores.new_zeros(len(scores))
    if votes.a.numel():
        log_probs = heads.choice_log_probs(scores, votes)
        outcome = votes.outcome.expand(len(scores), -1)
        loss = loss + (choice_weight * likelihood.choice_loss(log_probs, outcome, choice_smoothing)).sum(dim=1)
    if votes.thumb.numel():
        losses = likelihood.thumb_loss(scores[:, votes.response], heads.bars(votes), votes.thumb, thumb_smoothing)
        loss = loss + (thumb_weight * losses).sum(dim=1)
    return loss


def prior(heads: Heads) -> Tensor:
    """(K,) penalties of all but the weights: sd 1 for log eta around a half, for user offsets and the temperature
    effect; sd 3 for the bars."""
    narrow = (heads.log_eta - LOG_HALF).square() + heads.temperature.square() + heads.user_bars.square().sum(dim=1)
    return 0.5 * narrow + 0.5 * (heads.bad_bar.square() + heads.thumb_bar.square()) / 9


def start(k: int, features: int, users: int, like: Tensor) -> Heads:
    """K heads to start a fit from: scores and offsets of zero, and ties of width a half, in the dtype and on the device
    of `like`."""
    return Heads(
        weights=like.new_zeros(k, features),
        temperature=like.new_zeros(k),
        log_eta=like.new_full((k,), LOG_HALF),
        bad_bar=like.new_zeros(k),
        thumb_bar=like.new_zeros(k),
        user_bars=like.new_zeros(k, users),
    )


def fit(
    features: Tensor,
    votes: VoteTensors,
    l2: Tensor,
    label_smoothing: float,
    *,
    choice_weight: Tensor | None = None,
    thumb_weight: Tensor | None = None,
    max_iterations: int = 100,
) -> Heads:
    """K heads at the minimum of `objective`, one per entry of `l2` (K,).

    `features` (N, F). `choice_weight` (K, C) and `thumb_weight` (K, M) give each head its own weights: a fold or a
    bootstrap is a weight. They multiply the votes' own."""
    k, dtype = len(l2), features.dtype
    l2 = l2.to(dtype)
    ones_c, ones_m = features.new_ones(k, len(votes.a)), features.new_ones(k, len(votes.thumb))
    choice_weight = (ones_c if choice_weight is None else choice_weight) * votes.choice_weight
    thumb_weight = (ones_m if thumb_weight is None else thumb_weight) * votes.thumb_weight
    heads = start(k, features.shape[1], votes.users, features)
    parameters = [value.requires_grad_() for value in vars(heads).values()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max_iterations, history_size=20, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A mean, so that the tolerances do not depend on the number of heads.
        loss = objective(heads, features, votes, l2, label_smoothing, choice_weight, thumb_weight).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Heads(*(value.detach() for value in parameters))


def bootstrap(
    features: Tensor, votes: VoteTensors, l2: float, label_smoothing: float, refits: int, generator: torch.Generator
) -> Heads:
    """Heads refitted on conversations drawn with replacement."""
    drawn = torch.randint(votes.groups, (refits, votes.groups), generator=generator)
    counts = torch.zeros(refits, votes.groups, dtype=features.dtype)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=features.dtype))
    return fit(
        features,
        votes,
        torch.full((refits,), l2),
        label_smoothing,
        choice_weight=counts[:, votes.choice_group],
        thumb_weight=counts[:, votes.thumb_group],
    )

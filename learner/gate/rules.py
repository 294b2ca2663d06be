"""May this candidate be promoted? Every rule that fails says so in a sentence.

The judge is a head fitted on judge votes alone. A win on a prompt is the candidate's answer scoring above its
opponent's (a draw is half). The interval is a bootstrap over prompts and over the judge's votes at once: each refit
of the judge sees its own draw of conversations, and its win rate is taken over its own draw of prompts. An interval
over prompts alone would take the judge's word for the truth.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from learner.model.rollout import SampledAnswer
from learner.reward import linear_heads as fitting
from learner.reward.linear_heads import SignalTest, VoteTensors
from learner.reward.reward_model import Standardiser
from learner.settings import GateSettings


@dataclass(frozen=True)
class WinRate:
    """Share of held-out prompts on which the candidate wins, with its interval."""

    rate: float
    low: float
    high: float
    prompts: int

    def __str__(self) -> str:
        return f"{self.rate:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Look:
    """The held-out prompts, so many of them, and the confidence of the win rates' two-sided intervals there."""

    prompts: int
    confidence: float


# A first look at fewer prompts could hardly be clear.
FIRST_PROMPTS = 16


def looks(prompts: int, settings: GateSettings) -> list[Look]:
    """When to judge: at half of the prompts, where a clear case ends the gate, and at all of them.

    The error that one look would be allowed is divided between the two, so that both together err no more often than it
    would, however they depend on each other (the union bound)."""
    error = 1 - settings.confidence
    early = settings.early_share * error
    first, rest = Look(prompts // 2, 1 - early), Look(prompts, 1 - (error - early))
    return [first, rest] if early and first.prompts >= FIRST_PROMPTS else [Look(prompts, settings.confidence)]


@dataclass(frozen=True)
class Judge:
    """One head on all judge votes and K refits, in the coordinates of `basis`."""

    standardise: Standardiser
    basis: Tensor  # (F, P)
    point: Tensor  # (1, P)
    refits: Tensor  # (K, P)

    def scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(1, N) and (K, N) scores of answers with features (N, F)."""
        reduced = self.standardise(features) @ self.basis
        return self.point @ reduced.mT, self.refits @ reduced.mT


def fit_judge(
    features: Tensor,
    votes: VoteTensors,
    standardise: Standardiser,
    l2: float,
    label_smoothing: float,
    refits: int,
    generator: torch.Generator,
) -> Judge:
    """From judge votes on answers with features (N, F)."""
    voted, votes = votes.voted(features)
    standard = standardise(voted)
    basis = fitting.span_basis(standard)
    reduced = standard @ basis
    point = fitting.fit(reduced, votes, torch.tensor([l2]), label_smoothing)
    many = fitting.bootstrap(reduced, votes, l2, label_smoothing, refits, generator)
    return Judge(standardise, basis, point.weights, many.weights)


def wins(delta: Tensor) -> Tensor:
    """1 above zero, 0.5 at zero, 0 below."""
    return (torch.sign(delta) + 1) / 2


def win_rate(
    judge: Judge, ours: Tensor, theirs: Tensor, prompts: int, confidence: float, generator: torch.Generator
) -> WinRate:
    """Of answers `ours` over `theirs`, features (N * M, F): M answers to each of N prompts, a prompt's own in a row.
    Each of our answers meets each of theirs to the same prompt; prompts are drawn with their answers."""
    point, refits = (by_prompt(a, b, prompts) for a, b in zip(judge.scores(ours), judge.scores(theirs), strict=True))
    k = len(refits)
    drawn = torch.randint(prompts, (k, prompts), generator=generator)
    rates = refits.gather(1, drawn).mean(dim=1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(rates, torch.tensor([tail, 1 - tail])).tolist()
    return WinRate(float(point.mean()), low, high, prompts)


def by_prompt(ours: Tensor, theirs: Tensor, prompts: int) -> Tensor:
    """(K, N) share of wins on each prompt, from scores (K, N * M)."""
    ours, theirs = (scores.view(len(scores), prompts, -1) for scores in (ours, theirs))
    return wins(ours[:, :, :, None] - theirs[:, :, None]).mean(dim=(2, 3))


def length_matched(judge: Judge, ours: Tensor, theirs: Tensor) -> tuple[float, int]:
    """The point win rate over answers whose opponent's length is alike (the features' last entry is log length), and
    how many those are; NaN for none. Answers meet in order."""
    delta = judge.scores(ours)[0] - judge.scores(theirs)[0]
    alike = (ours[:, -1] - theirs[:, -1]).abs() <= fitting.LIKE_LENGTH
    return float(wins(delta)[0, alike].mean()), int(alike.sum())


@dataclass(frozen=True)
class Health:
    """How answers look, whoever likes them. Lengths in tokens."""

    length: float
    empty: float
    ended: float
    repetition: float


def health(samples: list[SampledAnswer]) -> Health:
    """Means over the samples."""
    n = len(samples)
    return Health(
        length=sum(len(s.token_ids) for s in samples) / n,
        empty=sum(not s.text.strip() for s in samples) / n,
        ended=sum(s.ended for s in samples) / n,
        repetition=sum(repetition(s.token_ids) for s in samples) / n,
    )


def repetition(token_ids: list[int], n: int = 4) -> float:
    """The share of n-grams that occurred before in the same answer."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Figures:
    """What was measured of one candidate on the held-out prompts."""

    step: int
    kl: float
    against_incumbent: WinRate
    against_reference: WinRate
    # The training reward model's own opinion against the incumbent: far above the judge's, it was over-optimised.
    trained_rate: float
    matched_rate: float
    matched_answers: int
    health: Health

    @property
    def low(self) -> float:
        """The weaker of the two lower bounds."""
        return min(self.against_incumbent.low, self.against_reference.low)

    @property
    def hopeless(self) -> bool:
        """Whether it surely loses to one of the two."""
        return min(self.against_incumbent.high, self.against_reference.high) < 0.5


@dataclass(frozen=True)
class Verdict:
    """The candidate that was chosen, and every rule that it broke."""

    chosen: Figures
    reasons: list[str] = field(default_factory=list)

    @property
    def promoted(self) -> bool:
        return not self.reasons


def broken_rules(figures: Figures, incumbent: Health, kl_budget: float, settings: GateSettings) -> list[str]:
    """The candidate's own rules, a sentence for each that is broken."""
    reasons = []
    for name, rate in (("the incumbent", figures.against_incumbent), ("the reference", figures.against_reference)):
        if not rate.low > 0.5:
            reasons.append(f"The win rate against {name} may be chance: {rate}.")
    if figures.kl > kl_budget:
        reasons.append(f"The sequence KL of {figures.kl:.1f} nats is over the budget of {kl_budget:g}.")
    low, high = settings.length_range
    share = figures.health.length / incumbent.length
    if not low <= share <= high:
        reasons.append(f"Answers are {share:.2f} times as long as the incumbent's, outside {low:g} to {high:g}.")
    if figures.health.empty > incumbent.empty + settings.empty_margin:
        reasons.append(f"{figures.health.empty:.0%} of the answers are empty (incumbent: {incumbent.empty:.0%}).")
    if figures.health.repetition > incumbent.repetition + settings.repetition_margin:
        reasons.append(
            f"{figures.health.repetition:.0%} of the 4-grams are repeated (incumbent: {incumbent.repetition:.0%})."
        )
    return reasons


def over_optimised(figures: Figures, candidates: list[Figures], margin: float) -> list[str]:
    """A sentence where, since an earlier candidate, the trained reward model's opinion rose and the judge's fell: what
    was gained is what only the one that was trained on sees (Gao et al. 2022)."""
    judged = figures.against_incumbent.rate
    for earlier in candidates:
        before = earlier.against_incumbent.rate
        rose = earlier.step < figures.step and figures.trained_rate > earlier.trained_rate
        if rose and before - judged > margin:
            return [
                f"From step {earlier.step} on the trained reward model's win rate rose to {figures.trained_rate:.2f} "
                f"and the judge's fell from {before:.2f} to {judged:.2f}."
            ]
    return []


def decide(
    candidates: list[Figures], signal: SignalTest, incumbent: Health, kl_budget: float, settings: GateSettings
) -> Verdict:
    """The best candidate by its weaker lower bound, among those that break the fewest rules, and what still stands
    against it."""
    rules = {
        figures.step: broken_rules(figures, incumbent, kl_budget, settings)
        + over_optimised(figures, candidates, settings.gap_margin)
        for figures in candidates
    }
    chosen = min(candidates, key=lambda figures: (len(rules[figures.step]), -figures.low))
    reasons = list(rules[chosen.step])
    if not signal.p_value < settings.signal_p:
        reasons.insert(
            0,
            f"The votes carry no clear signal: their accuracy is {signal.accuracy:.2f} where shuffled votes give "
            f"{signal.null_accuracy:.2f} (p = {signal.p_value:.3f}).",
        )
    return Verdict(chosen, reasons)

"""The rules for promoting a candidate. Each broken rule is reported in a sentence."""

import math
from dataclasses import dataclass, field

from learner.improve.budget import Budget
from learner.settings import GateSettings
from server.store.learning.round_metrics import AnswerHealth, CandidateMetrics


@dataclass(frozen=True)
class Verdict:
    """The chosen candidate, a sentence for every rule that it broke, and whether people are to decide between it and
    the incumbent."""

    chosen: CandidateMetrics
    reasons: list[str] = field(default_factory=list)
    canary: bool = False

    @property
    def promoted(self) -> bool:
        return not self.reasons


def broken_rules(
    figures: CandidateMetrics, incumbent: AnswerHealth, budget: Budget, settings: GateSettings, *, canary: bool
) -> list[str]:
    """The rules about one candidate: a sentence for each that it breaks. A `canary` need only not lose for certain,
    since people then decide."""
    reasons = _losses(figures) if canary else _doubts(figures, settings.best_margin)
    most = budget.of(figures.health.length)
    if figures.kl > most:
        reasons.append(f"The sequence KL of {figures.kl:.2f} nats is over the budget of {most:.2f}.")
    low, high = settings.length_range
    share = figures.health.length / incumbent.length
    if not low <= share <= high:
        reasons.append(f"Answers are {share:.2f} times as long as the incumbent's, outside {low:g} to {high:g}.")
    return reasons + _ills(figures, incumbent, settings)


def broken_rules_of_reference(
    figures: CandidateMetrics, incumbent: AnswerHealth, shown_length: float, settings: GateSettings
) -> list[str]:
    """The rules about a candidate that is to become the reference: a sentence for each that it breaks. Its answers may
    be as short or long as those that people showed, whose mean length is `shown_length` tokens."""
    reasons = _losses(figures) if not math.isnan(figures.against_incumbent.rate) else []
    low, high = settings.length_range
    least, most = low * min(incumbent.length, shown_length), high * max(incumbent.length, shown_length)
    if not least <= figures.health.length <= most:
        reasons.append(f"Answers have {figures.health.length:.0f} tokens, outside {least:.0f} to {most:.0f}.")
    return reasons + _ills(figures, incumbent, settings)


def _ills(figures: CandidateMetrics, incumbent: AnswerHealth, settings: GateSettings) -> list[str]:
    """A sentence for each way in which answers became worse that no judge need see."""
    reasons = []
    if figures.health.empty > incumbent.empty + settings.empty_margin:
        reasons.append(f"{figures.health.empty:.0%} of the answers are empty (incumbent: {incumbent.empty:.0%}).")
    if figures.health.repetition > incumbent.repetition + settings.repetition_margin:
        reasons.append(
            f"{figures.health.repetition:.0%} of the 4-grams are repeated (incumbent: {incumbent.repetition:.0%})."
        )
    return reasons


def _doubts(figures: CandidateMetrics, best_margin: float) -> list[str]:
    """A sentence for each opponent that the candidate may not beat."""
    reasons = []
    for name, rate in (("incumbent", figures.against_incumbent), ("reference", figures.against_reference)):
        if not rate.low > 0.5:
            reasons.append(f"The win rate against the {name} may be chance: {rate.explained}.")
    best = figures.against_best
    # Small steps down, each within the margin, must not add up.
    if best and not (best.rate > 0.5 and best.low > 0.5 - best_margin):
        reasons.append(f"It may be worse than the best version so far: {best.explained}.")
    return reasons


def _losses(figures: CandidateMetrics) -> list[str]:
    """A sentence for each opponent that certainly wins."""
    return [f"It loses to the {name}: {rate.explained}." for name, rate in figures.rates.items() if rate.loses]


def over_optimised(figures: CandidateMetrics, candidates: list[CandidateMetrics]) -> bool:
    """Whether the judge is certain that an earlier candidate is better, and the trained reward model says the opposite:
    the gain is then only visible to the model that was trained on (Gao et al. 2022)."""
    return any(
        earlier.step in figures.loses_to and figures.trained_rate > earlier.trained_rate for earlier in candidates
    )


def decide(
    candidates: list[CandidateMetrics],
    incumbent: AnswerHealth,
    budget: Budget,
    settings: GateSettings,
    *,
    canary: bool,
) -> Verdict:
    """Chooses the most promising candidate among those that break the fewest rules and are not over-optimised. The
    reasons are the rules that it breaks."""
    sound = [figures for figures in candidates if not over_optimised(figures, candidates)]
    rules = {figures.step: broken_rules(figures, incumbent, budget, settings, canary=canary) for figures in sound}
    chosen = min(sound, key=lambda figures: (len(rules[figures.step]), -figures.promise))
    reasons = rules[chosen.step]
    doubts = settings.canary == "always" or bool(_doubts(chosen, best_margin=0.0))
    return Verdict(chosen, reasons, canary=canary and not reasons and doubts)

"""The rules for promoting a candidate. Each broken rule is reported in a sentence."""

from dataclasses import dataclass, field

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
    figures: CandidateMetrics, incumbent: AnswerHealth, kl_budget: float, settings: GateSettings, *, canary: bool
) -> list[str]:
    """The rules about one candidate: a sentence for each that it breaks. Where a `canary` is possible, it need only be
    no worse than the incumbent, since people then decide."""
    reasons, against = [], figures.against_incumbent
    no_worse = against.rate > 0.5 and against.low > 0.5 - settings.canary_margin
    if not (against.low > 0.5 or (canary and no_worse)):
        reasons.append(f"The win rate against the incumbent may be chance: {against}.")
    if not figures.against_reference.low > 0.5:
        reasons.append(f"The win rate against the reference may be chance: {figures.against_reference}.")
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


def over_optimised(figures: CandidateMetrics, candidates: list[CandidateMetrics], margin: float) -> list[str]:
    """A sentence if, since an earlier candidate, the trained reward model's win rate rose and the judge's fell: the
    gain is then only visible to the model that was trained on (Gao et al. 2022)."""
    judged = figures.against_incumbent.rate
    for earlier in candidates:
        before = earlier.against_incumbent.rate
        rose = earlier.step < figures.step and figures.trained_rate > earlier.trained_rate
        if rose and before - judged > margin:
            return [
                f"Since step {earlier.step} the trained reward model's win rate rose to {figures.trained_rate:.2f} "
                f"and the judge's fell from {before:.2f} to {judged:.2f}."
            ]
    return []


def decide(
    candidates: list[CandidateMetrics],
    incumbent: AnswerHealth,
    kl_budget: float,
    settings: GateSettings,
    *,
    canary: bool,
) -> Verdict:
    """Chooses the candidate with the best lower bound, the weaker of its two, among those that break the fewest rules.
    The reasons are the rules that it breaks."""
    rules = {
        figures.step: broken_rules(figures, incumbent, kl_budget, settings, canary=canary)
        + over_optimised(figures, candidates, settings.gap_margin)
        for figures in candidates
    }
    chosen = min(candidates, key=lambda figures: (len(rules[figures.step]), -figures.low))
    reasons = rules[chosen.step]
    people_decide = settings.canary == "always" or not chosen.against_incumbent.low > 0.5
    return Verdict(chosen, reasons, canary=not reasons and people_decide)

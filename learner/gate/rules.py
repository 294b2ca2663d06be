"""The rules for promoting a candidate. Each broken rule is reported in a sentence."""

from dataclasses import dataclass, field

from learner.settings import GateSettings
from server.store.learning.round_metrics import AnswerHealth, CandidateMetrics, WinRate


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
    if not (against.low > 0.5 or (canary and no_worse(against, settings))):
        reasons.append(f"The win rate against the incumbent may be chance: {against.explained}.")
    if not figures.against_reference.low > 0.5:
        reasons.append(f"The win rate against the reference may be chance: {figures.against_reference.explained}.")
    # Small steps down, each within the margin, must not add up.
    if figures.against_best and not no_worse(figures.against_best, settings):
        reasons.append(f"It may be worse than the best version so far: {figures.against_best.explained}.")
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


def no_worse(rate: WinRate, settings: GateSettings) -> bool:
    """Whether it wins more often than not, and certainly not much more rarely."""
    return rate.rate > 0.5 and rate.low > 0.5 - settings.canary_margin


def over_optimised(figures: CandidateMetrics, candidates: list[CandidateMetrics], margin: float) -> bool:
    """Whether, since an earlier candidate, the trained reward model's win rate rose and the judge's fell: the gain is
    then only visible to the model that was trained on (Gao et al. 2022)."""
    return any(
        earlier.step < figures.step
        and figures.trained_rate > earlier.trained_rate
        and earlier.against_incumbent.rate - figures.against_incumbent.rate > margin
        for earlier in candidates
    )


def decide(
    candidates: list[CandidateMetrics],
    incumbent: AnswerHealth,
    kl_budget: float,
    settings: GateSettings,
    *,
    canary: bool,
) -> Verdict:
    """Chooses the candidate with the best lower bound, the weaker of its two, among those that break the fewest rules
    and are not over-optimised. The reasons are the rules that it breaks."""
    sound = [figures for figures in candidates if not over_optimised(figures, candidates, settings.gap_margin)]
    rules = {figures.step: broken_rules(figures, incumbent, kl_budget, settings, canary=canary) for figures in sound}
    chosen = min(sound, key=lambda figures: (len(rules[figures.step]), -figures.low))
    reasons = rules[chosen.step]
    people_decide = settings.canary == "always" or not chosen.against_incumbent.low > 0.5
    return Verdict(chosen, reasons, canary=not reasons and people_decide)

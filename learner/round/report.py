"""The result of a round, and the table that shows it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from server.shared.printable import printable
from server.store.learning.round_metrics import GateMetrics, RoundMetrics

# Added to the table if training ended before its last step.
ENDED = {"steps": "", "kl_budget": ", stopped at the KL budget", "uncertainty": ", stopped as the score grew uncertain"}


@dataclass(frozen=True)
class Report:
    """The result of `run_once`, as shown by the closing table and `--json`. If the call raised, the state is failed."""

    state: Literal["nothing", "promoted", "canary", "rejected", "failed"]
    sentence: str
    round_id: str | None = None
    policy_version: str | None = None
    reward_model_version: str | None = None
    incumbent_version: str | None = None
    metrics: RoundMetrics = field(default_factory=RoundMetrics)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {**vars(self), "metrics": self.metrics.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        """The inverse of `to_json`."""
        return cls(**{**values, "metrics": RoundMetrics.from_json(values.get("metrics", {}))})


def rows(report: Report) -> Iterator[tuple[str, str]]:
    """(name, value) rows in the order of the stages, up to where the round got."""
    m = report.metrics
    if votes := m.votes:
        kinds = f"{votes.choices} choices, {votes.thumbs} thumbs, {votes.corrections} corrections"
        yield "votes used", f"{kinds} ({votes.train} train, {votes.judge} judge)"
        if votes.quarantined:
            yield "left out", f"{votes.quarantined} votes of users in quarantine"
    if m.voters and m.voters.doubted:
        yield "voters", f"{m.voters.doubted} of {m.voters.voters} count less than half: see `learner users`"
    if signal := m.signal:
        yield "signal", f"p = {signal.p_value:.2g}, cross-validated accuracy {_two(signal.accuracy)}"
    if model := m.reward_model:
        yield "reward model, held out", f"accuracy {_two(model.accuracy)} on {model.votes} choices"
        yield "", f"NLL {_two(model.nll)}, ECE {_two(model.ece)}"
        yield "simpler rules", f"longer wins {_two(model.longer_wins)}, hotter wins {_two(model.hotter_wins)}"
        if model.imported:
            used = f"weight {model.prior_weight:g}" if model.prior_weight else "not used: they do not predict the votes"
            yield "imported", f"{model.imported} preferences, {used}"
        yield (
            "controls",
            f"similar length {_two(model.matched_accuracy)} on {model.matched_votes}, correlation with length "
            f"{_two(model.length_correlation)}, temperature effect {_two(model.temperature_effect)}",
        )
    if m.sft:
        left_out = f", {m.sft.left_out} left out" if m.sft.left_out else ""
        yield "imitated", f"{m.sft.demonstrations} demonstrations, {m.sft.corrections} corrections{left_out}"
        yield "loss, held out", f"{m.sft}: after {m.sft.chosen} of {len(m.sft.epochs) - 1} passes"
    if m.improvement and (steps := m.improvement.steps):
        ended = ENDED[m.improvement.ended_by]
        yield "reward", f"{steps[0].score:+.2f} -> {steps[-1].score:+.2f} in {len(steps)} steps{ended}"
    if m.gate:
        yield from gate_rows(m.gate, report, one_of_many=not m.sft)
    if m.seconds:
        yield "seconds", ", ".join(f"{name} {value:.0f}" for name, value in m.seconds.items())
        yield "total", f"{sum(m.seconds.values()):.0f} s"


def gate_rows(gate: GateMetrics, report: Report, *, one_of_many: bool) -> Iterator[tuple[str, str]]:
    """The rows about the candidate, which may be the only one."""
    chosen = gate.chosen
    if one_of_many:
        yield "candidate", f"step {chosen.step} of {[candidate.step for candidate in gate.candidates]}"
    yield "KL", f"{chosen.kl:.1f} nats per response to the reference"
    if math.isnan(chosen.against_incumbent.rate):
        yield "win rate", "unknown: there are too few votes to judge by"
    else:
        yield "win rate", f"{chosen.against_incumbent} against the incumbent, {report.incumbent_version}"
        yield "", f"{chosen.against_reference} against the reference"
    if chosen.against_best:
        yield "", f"{chosen.against_best} against {gate.best_version}, the best so far"
    if gate.reasons and gate.no_canary:
        yield "no canary", gate.no_canary
    if gate.checks:
        yield "checks", str(gate.checks)
        yield from (("", f"{one.name} {one.why}: {one.answer}") for one in gate.checks.failed)
    yield "answer length", f"{gate.incumbent_health.length:.0f} -> {chosen.health.length:.0f} tokens"


def outcome(report: Report) -> str:
    """The outcome in a sentence, for the user who requested the round."""
    match report.state:
        case "promoted":
            return f"{report.policy_version} is promoted: {report.sentence}"
        case "failed":
            return f"the round failed: {report.sentence}"
        case "nothing":
            return f"nothing to learn: {report.sentence}"
    # The sentence of a rejected version already says so.
    return report.sentence if report.policy_version else f"no new version: {report.sentence}"


def print_report(report: Report, console: Console) -> None:
    """The table, then the outcome in a sentence."""
    if figures := list(rows(report)):
        table = Table(title=f"round {report.round_id}", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in figures:
            table.add_row(name, value)
        console.print(table, highlight=False)
    console.print(printable(report.sentence), markup=False, highlight=False, soft_wrap=True)


def _two(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.2f}"

"""What a round came to, and the table that shows it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from server.shared.printable import printable


@dataclass(frozen=True)
class Report:
    """How a call of `run_once` ended: what the closing table shows and `--json` prints. One that raised has failed."""

    state: Literal["nothing", "promoted", "rejected", "failed"]
    sentence: str
    round_id: str | None = None
    policy_version: str | None = None
    reward_model_version: str | None = None
    incumbent_version: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def rows(report: Report) -> Iterator[tuple[str, str]]:
    """(figure, value), in the order of the stages; only what the round got to."""
    m = report.metrics
    if votes := m.get("votes"):
        kinds = ", ".join(f"{votes[kind]} {kind}" for kind in ("choices", "thumbs", "corrections"))
        yield "votes used", f"{kinds} ({votes['train']} train, {votes['judge']} judge)"
        if left_out := votes.get("quarantined"):
            yield "left out", f"{left_out} votes of users in quarantine"
    if (voters := m.get("voters")) and voters["doubted"]:
        yield "voters", f"{voters['doubted']} of {voters['voters']} weigh less than half: see `learner users`"
    if signal := m.get("signal"):
        accuracy, null = _two(signal["accuracy"]), _two(signal["null_accuracy"])
        yield "signal", f"accuracy {accuracy}, of shuffled votes {null}, p = {signal['p_value']:.3f}"
    if rm := m.get("reward_model"):
        yield "reward model, held out", f"accuracy {_two(rm['accuracy'])} on {rm['votes']} choices"
        yield "", f"NLL {_two(rm['nll'])}, ECE {_two(rm['ece'])}"
        yield "simpler rules", f"longer wins {_two(rm['longer_wins'])}, hotter wins {_two(rm['hotter_wins'])}"
        yield (
            "controls",
            f"of like length {_two(rm['matched_accuracy'])} on {rm['matched_votes']}, correlation with length "
            f"{_two(rm['length_correlation'])}, temperature effect {_two(rm['temperature_effect'])}",
        )
    if steps := m.get("ppo", {}).get("steps"):
        why = {"steps": "", "kl_budget": ", stopped at the KL budget", "uncertainty": ", stopped as it grew uncertain"}
        yield (
            "reward",
            f"{steps[0]['score']:+.2f} -> {steps[-1]['score']:+.2f} in {len(steps)} steps{why[m['ppo']['ended_by']]}",
        )
    if gate := m.get("gate"):
        chosen = gate["chosen"]
        yield "candidate", f"step {chosen['step']} of {[c['step'] for c in gate['candidates']]}"
        yield "KL", f"{chosen['kl']:.1f} nats a response to the reference"
        yield "win rate", f"{_interval(chosen['against_incumbent'])} against the incumbent, {report.incumbent_version}"
        yield "", f"{_interval(chosen['against_reference'])} against the reference"
        yield "answer length", f"{gate['incumbent_health']['length']:.0f} -> {chosen['health']['length']:.0f} tokens"
    if seconds := m.get("seconds"):
        yield "seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        yield "in all", f"{sum(seconds.values()):.0f} s"


def outcome(report: Report) -> str:
    """How it ended, in a sentence for whoever asked for it."""
    match report.state:
        case "promoted":
            return f"{report.policy_version} is promoted: {report.sentence}"
        case "failed":
            return f"the round failed: {report.sentence}"
        case "nothing":
            return f"nothing to learn: {report.sentence}"
    # What was not promoted says so itself.
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


def _two(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _interval(rate: dict[str, Any]) -> str:
    return f"{rate['rate']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"

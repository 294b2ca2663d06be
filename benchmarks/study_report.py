"""docs/benchmarks/study.md and its picture, from the results of `benchmarks/study.py`."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from clients.demo.voter import TASTES
from clients.interval import wilson

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
COLOURS = ("#1f5fa8", "#b04a3a", "#3a7d44", "#8a6d1f", "#6b4fa0", "#2a8c8c", "#a8487f", "#5a5a5a")
Results = dict[str, dict[str, Any]]


def write_report(results: Results) -> None:
    draw(results, DOCS / "study.png")
    (DOCS / "study.md").write_text("\n".join(page(results)) + "\n", encoding="utf-8")


def page(results: Results) -> Iterator[str]:
    yield "# What a round learns from simulated voters"
    yield ""
    yield f"`python benchmarks/study.py --write`, {datetime.now(UTC):%Y-%m-%d}; answers of 64 tokens."
    yield "Tastes: " + "; ".join(f"*{name}*: {taste.sentence}" for name, taste in TASTES.items()) + "."
    yield ""
    yield "![Reward model accuracy over votes, and win rate over training](study.png)"
    yield from reward_table(list(results["rewards"].values()))
    yield from round_table(list(results["rounds"].values()))
    yield from start_table(list(results["starts"].values()))
    yield from shuffle_lines(list(results["shuffles"].values()))


def reward_table(found: list[dict[str, Any]]) -> Iterator[str]:
    if not found:
        return
    yield from ("", "## The reward model alone", "")
    yield (
        "Accuracy against the taste without flips, on comparisons of unseen questions: mean of the seeds (lowest to "
        "highest). A round trains on some 60 % of the votes and judges with the rest."
    )
    yield ""
    by_cell: dict[tuple[str, int, float], list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        by_cell[one["cell"]["taste"], one["cell"]["votes"], one["cell"]["flips"]].append(one)
    columns = sorted({(votes, flips) for _, votes, flips in by_cell})
    yield (
        "| taste | longer wins | "
        + " | ".join(f"{votes} votes, {flips:.0%} flipped" for votes, flips in columns)
        + " |"
    )
    yield "|---|---:|" + "---:|" * len(columns)
    for taste in TASTES:
        longer = next(one["longer_wins"] for one in found if one["cell"]["taste"] == taste)
        cells = [accuracy(by_cell[taste, *column]) for column in columns]
        yield f"| {taste} | {longer:.2f} | " + " | ".join(cells) + " |"
    means = [mean(one["accuracy"] for taste in TASTES for one in by_cell[taste, *column]) for column in columns]
    yield "| mean | | " + " | ".join(f"{value:.3f}" for value in means) + " |"


def accuracy(cells: list[dict[str, Any]]) -> str:
    values = [one["accuracy"] for one in cells]
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def round_table(found: list[dict[str, Any]]) -> Iterator[str]:
    if not found:
        return
    yield from ("", "## Whole rounds", "")
    yield (
        "Win rate by the taste over the reference's answers to unseen questions, ties counted half, with its 95 % "
        "interval. *Best* is the best candidate of the run in hindsight. A refusal changes nothing and counts as 0.50 "
        "in the means."
    )
    yield ""
    yield "| taste | votes | flipped | seed | reward model | outcome | win rate | best | KL, nats | minutes |"
    yield "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|"
    for one in found:
        cell, rates = one["cell"], one.get("win_rates", {})
        best = f"{max(rates.values()):.2f}" if rates else ""
        yield (
            f"| {cell['taste']} | {cell['votes']} | {cell['flips']:.0%} | {cell['seed']} | "
            f"{one.get('accuracy', float('nan')):.2f} | {outcome(one)} | {win_rate(one)} | {best} | "
            f"{published(one)[1]} | {one['minutes']:.1f} |"
        )
    groups: dict[tuple[int, float], list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        groups[one["cell"]["votes"], one["cell"]["flips"]].append(one)
    for (votes, flips), cells in groups.items():
        rates = [published(one)[0] for one in cells]
        gaps = [max(one["win_rates"].values()) - published(one)[0] for one in cells if one.get("win_rates")]
        yield ""
        promoted = sum(one["state"] == "promoted" for one in cells)
        yield (
            f"{votes} votes, {flips:.0%} flipped: mean win rate {mean(rates):.3f}, lowest {min(rates):.2f}, at most "
            f"{max(gaps, default=0.0):.2f} behind the best of its run, {promoted} of {len(cells)} promoted."
        )


def start_table(found: list[dict[str, Any]]) -> Iterator[str]:
    if not found:
        return
    yield from ("", "## Where a second round starts", "")
    yield (
        "200 votes, a round, 200 more, and a second round on all of them (a tenth flipped): PPO again from the "
        "reference, or from the active policy. Win rates over the reference, of the version served after the round."
    )
    yield ""
    yield "| taste | seed | first round | KL, nats | second from | outcome | win rate | KL, nats | minutes |"
    yield "|---|---:|---:|---:|---|---|---:|---:|---:|"
    for one in found:
        cell, first = one["cell"], one["first"]
        for start in ("reference", "active"):
            if second := one.get(start):
                serving = second if second["state"] == "promoted" else first
                yield (
                    f"| {cell['taste']} | {cell['seed']} | {win_rate(first)} | {published(first)[1]} | {start} | "
                    f"{outcome(second)} | {win_rate(serving)} | {published(serving)[1]} | {second['minutes']:.1f} |"
                )


def win_rate(one: dict[str, Any]) -> str:
    """The win rate of the version that a round published, with its 95 % interval."""
    rate, _ = published(one)
    if one["state"] != "promoted":
        return f"{rate:.2f}"
    low, high = wilson(rate * one["questions"], one["questions"])
    return f"{rate:.2f} [{low:.2f}, {high:.2f}]"


def outcome(one: dict[str, Any]) -> str:
    return f"step {one['metrics']['gate']['chosen']['step']}" if one["state"] == "promoted" else "refused"


def published(one: dict[str, Any]) -> tuple[float, str]:
    """(win rate, KL) of the version that serves after the round."""
    if one["state"] != "promoted":
        return 0.5, ""
    chosen = one["metrics"]["gate"]["chosen"]
    return one["win_rates"][str(chosen["step"])], f"{chosen['kl']:.1f}"


def shuffle_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    if not found:
        return
    at_5, at_2 = (sum(one["p_value"] < level for one in found) for level in (0.05, 0.02))
    promoted = sum(one["state"] == "promoted" for one in found)
    yield from ("", "## Votes without a signal", "")
    low, high = wilson(promoted, len(found))
    yield (
        f"{len(found)} times, 200 votes were shuffled at random among their comparisons. {at_5} passed the signal "
        f"test at 5 %, {at_2} at the gate's 2 %; {promoted} ended in a promotion (95 % interval of the rate "
        f"{max(low, 0.0):.3f} to {high:.3f})."
    )


def draw(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    panels = [(draw_rewards, results["rewards"]), (draw_rounds, results["rounds"])]
    panels = [(panel, found) for panel, found in panels if found]
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axes, (panel, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, list(found.values()))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def draw_rewards(axes: Any, found: list[dict[str, Any]]) -> None:
    """Plots accuracy over votes, with a line per taste and a band from the lowest to the highest seed."""
    for colour, taste in zip(COLOURS, TASTES, strict=True):
        by_votes: dict[int, list[float]] = defaultdict(list)
        for one in found:
            if one["cell"]["taste"] == taste and one["cell"]["flips"] == 0.1:
                by_votes[one["cell"]["votes"]].append(one["accuracy"])
        if votes := sorted(by_votes):
            low, high = ([pick(by_votes[n]) for n in votes] for pick in (min, max))
            axes.plot(votes, [mean(by_votes[n]) for n in votes], color=colour, marker="o", markersize=4, label=taste)
            axes.fill_between(votes, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks([50, 200, 1000], ["50", "200", "1,000"])
    axes.minorticks_off()
    axes.set_xlabel("votes, 10 % flipped")
    axes.set_ylabel("accuracy against the taste")
    axes.set_title("Reward model, unseen comparisons", loc="left", fontsize=10)


def draw_rounds(axes: Any, found: list[dict[str, Any]]) -> None:
    """Plots the win rate of every candidate over the steps, with a dot at the published one."""
    shown = [one for one in found if (one["cell"]["votes"], one["cell"]["flips"], one["cell"]["seed"]) == (200, 0.1, 0)]
    for one in shown:
        taste, rates = one["cell"]["taste"], one.get("win_rates", {})
        colour, steps = COLOURS[list(TASTES).index(taste)], sorted(map(int, rates))
        axes.plot(steps, [rates[str(step)] for step in steps], color=colour, linewidth=1.5, label=taste)
        if one["state"] == "promoted":
            step = one["metrics"]["gate"]["chosen"]["step"]
            axes.plot([step], [rates[str(step)]], color=colour, marker="o", markersize=8)
    axes.axhline(0.5, color="#6b6b6b", linewidth=0.8, linestyle=":")
    axes.set_xlabel("PPO step (dot: published)")
    axes.set_ylabel("win rate over the reference")
    axes.set_title("200 votes, 10 % flipped, unseen questions", loc="left", fontsize=10)

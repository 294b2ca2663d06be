"""docs/benchmarks/poison.md, from the results of `benchmarks/poison.py`."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "poison.md"
DEFENCES = ("none", "cap", "full")
HEADINGS = {
    "accuracy": "Points of accuracy lost",
    "best of four": "Points lost in the win rate of the best of four answers, a cheap substitute for PPO",
}
Results = dict[str, dict[str, list[dict[str, Any]]]]


def write_report(results: Results, honest: str) -> None:
    REPORT.write_text("\n".join(page(results, honest)) + "\n", encoding="utf-8")


def page(results: Results, honest: str) -> Iterator[str]:
    runs = max(len(rows) for by_attack in results.values() for rows in by_attack.values())
    yield "# What poisoned votes cost"
    yield ""
    yield f"`python benchmarks/poison.py --write`, {datetime.now(UTC):%Y-%m-%d}. Mean and standard error over {runs}"
    yield "runs, four tastes by four seeds, each compared with honest voters on the same comparisons. Voters err"
    yield "in a tenth of their votes unless noted; the fit uses 60 % of the votes. Negative numbers are gains."
    yield ""
    yield "Columns: *none*, every vote weighs the same; *cap*, no user has more than a twentieth of the weight; *full*,"
    yield "the cap, and voters weighted by how well others predict them (`reward.weigh_voters`), as in a round."
    yield "The last two columns are the remaining weight under *full* of the row's voters, and of all others."
    for crowd, by_attack in results.items():
        base = by_attack[honest]
        yield from ("", f"## {crowd}")
        for figure, heading in HEADINGS.items():
            level = mean(one["none"][figure] for one in base)
            yield from ("", f"{heading}; honest voters: {level:.3f}", "")
            yield f"| votes | {' | '.join(DEFENCES)} | weight of theirs | of others |"
            yield "|---|" + "---:|" * (len(DEFENCES) + 2)
            for attack, rows in by_attack.items():
                lost = [losses(base, rows, defence, figure) for defence in DEFENCES]
                theirs = [row["weight of hostile"] for row in rows if row["weight of hostile"] is not None]
                weights = [f"{mean(theirs):.2f}" if theirs else "", f"{mean(r['weight of others'] for r in rows):.3f}"]
                yield f"| {attack} | {' | '.join([*lost, *weights])} |"


def losses(base: list[dict[str, Any]], rows: list[dict[str, Any]], defence: str, figure: str) -> str:
    """Mean and standard error of each run's loss against its twin without attack and defence."""
    lost = [100 * (twin["none"][figure] - row[defence][figure]) for twin, row in zip(base, rows, strict=True)]
    return f"{mean(lost):+.1f} ± {stdev(lost) / len(lost) ** 0.5:.1f}"

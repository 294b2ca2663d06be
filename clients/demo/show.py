"""The demo's output apart from progress."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clients.demo.plan import CONCURRENCY, Pace, Plan
from clients.demo.record import Record
from clients.demo.voter import TASTES, Answer, Taste
from clients.interval import wilson
from clients.text import printable

SHOWN = 4
# The server's start and stop, and other parts that depend little on the machine's speed.
AROUND_SECONDS = 80


def say(console: Console, number: str, text: str) -> None:
    console.print(Text(f"\n[{number}/5] {text}", style="bold"))


def show_found(console: Console, record: Record) -> None:
    counts = {
        f"answer{{}} of {record.plan.held_out} before": len(record.before),
        "comparison{} with their votes": len(record.compared),
        "round{} of the learner": len(record.reports),
        f"answer{{}} of {record.plan.held_out} after": len(record.after),
    }
    found = ", ".join(f"{count} {what.format('s' * (count > 1))}" for what, count in counts.items() if count)
    console.print(Text(f"Resuming the demo in {record.directory}: {found}."), soft_wrap=True)


def show_estimate(console: Console, plan: Plan, pace: Pace) -> None:
    minutes = max(1, round((AROUND_SECONDS + plan.answers * pace.seconds_per_answer) / 60))
    words = f"about {minutes} minute{'s' * (minutes > 1)} in total"
    together = CONCURRENCY * pace.seconds_per_answer
    console.print(f"{CONCURRENCY} answers at once take {together:.1f} s here: {words}.", highlight=False)


def show_swap(console: Console, record: Record, version: str) -> None:
    """Prints the serving version and the live streams' view of the swap."""
    ran = f"{record.streams} long streams ran around the swap; none failed or lost text." if record.streams else ""
    console.print(f"{version} is serving. {ran}".strip())
    for spans in record.crossing:
        console.print(f"One stream spanned the swap: {spans}.", highlight=False)
    if not record.crossing:
        console.print("None of them was open at the swap itself." if ran else "No stream was open during the swap.")


def show(console: Console, record: Record) -> None:
    taste, n = TASTES[record.plan.taste], record.plan.held_out
    held_out, _ = record.plan.questions()
    befores, afters = ([answers[place] for place in range(n)] for answers in (record.before, record.after))
    report = record.promoted
    assert report
    table = Table(title="The same questions and seeds (the first few)", show_lines=True, expand=True)
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1)
    for question, before, after in list(zip(held_out, befores, afters, strict=True))[:SHOWN]:
        table.add_row(*(Text.assemble((f"{question}\n", "bold"), printable(one.text)) for one in (before, after)))
    console.print(table)

    wins, ties = outcome(taste, befores, afters)
    low, high = wilson(wins + ties / 2, n)
    chosen = report["metrics"]["gate"]["chosen"]
    figures = Table(show_header=False, box=None, pad_edge=False)
    figures.add_column(style="bold", no_wrap=True)
    figures.add_column(overflow="fold")
    figures.add_row("taste", Text(taste.sentence))
    figures.add_row(
        "win rate by taste",
        f"{(wins + ties / 2) / n:.2f}, 95 % interval [{low:.2f}, {high:.2f}]".replace("[", r"\[")
        + f": {wins} won, {ties} tied, {n - wins - ties} lost",
    )
    figures.add_row("KL to the reference", f"{chosen['kl']:.1f} nats per answer, measured by the learner")
    figures.add_row("seconds by stage", seconds_words(record.seconds))
    if learner_seconds := report["metrics"].get("seconds"):
        figures.add_row("in the last round", seconds_words(learner_seconds))
    figures.add_row("total", f"{sum(record.seconds.values()):.0f} s")
    console.print(figures)


def outcome(taste: Taste, before: Sequence[Answer], after: Sequence[Answer]) -> tuple[int, int]:
    """(wins, ties) of the answers in `after`, compared question by question."""
    scores = [(taste.score(one), taste.score(other)) for one, other in zip(after, before, strict=True)]
    return sum(new > old for new, old in scores), sum(new == old for new, old in scores)


def seconds_words(seconds: dict[str, float]) -> str:
    """ "round 180, swap 2"."""
    return ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())

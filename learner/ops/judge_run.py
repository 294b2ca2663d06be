"""`learner judge` in a terminal: how far it is, what it used, and how far it agrees with people."""

from contextlib import closing

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from learner.judge.agreement import bias_of
from learner.judge.judge import Used, judge_comparisons
from learner.judge_settings import JudgeSettings
from learner.reward.machine_votes import MIN_PAIRS, Agreement, agreement
from learner.settings import LearnerSettings
from server.store.store import Store


def run_judge(settings: LearnerSettings, console: Console) -> str:
    """Judges what is missing, with a progress bar; returns a sentence about the judge. Raises ServiceError."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[used]}"), console=console) as progress:
        task = progress.add_task("judging comparisons", total=None, used="")

        def on_pair(used: Used, pairs: int) -> None:
            progress.update(task, total=pairs, completed=used.pairs, used=said_of(used, settings.judge))

        used = judge_comparisons(settings, on_pair)
    with closing(Store.open(settings.data_dir)) as store:
        snapshot = store.snapshots.take(judge=settings.judge.name)
        bias = bias_of(store.machine_choices.all(settings.judge.name))
    found = agreement(snapshot.machine, snapshot.choices)
    unreadable = f" {used.unreadable} replies could not be read." if used.unreadable else ""
    judged = f"{used.pairs} comparisons judged ({said_of(used, settings.judge)}).{unreadable}"
    return f"{judged} {about(found)} {bias}"


def said_of(used: Used, settings: JudgeSettings) -> str:
    """Tokens, and what they cost if prices are set."""
    tokens = f"{used.prompt_tokens + used.answer_tokens:,} tokens"
    cost = used.cost(settings)
    return f"{tokens}, cost {cost:.4f}" if cost else tokens


def about(found: Agreement) -> str:
    """How far the judge agrees with people, and what its choices count."""
    if found.pairs < MIN_PAIRS:
        return f"It and people both named a winner of {found.pairs} comparisons; from {MIN_PAIRS} on its choices count."
    low, high = found.interval
    return (
        f"It agrees with people on {found.agreed} of {found.pairs} comparisons ({found.agreed / found.pairs:.2f} "
        f"[{low:.2f}, {high:.2f}]), so each of its choices counts {found.weight:.2f} of a person's."
    )

"""`make demo`: the whole loop before one's eyes, nothing mocked.

A server is started on a fresh data directory, a simulated voter with a stated taste votes over gRPC, the learner runs
one round, the server swaps to the new policy under live streams, and the same held-out questions are answered before
and after. Whatever goes wrong ends it with one sentence and exit code 1: a failed call, a broken stream, a learner
that fails or refuses twice, a new version that is not the one serving.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from clients.client import Client
from clients.errors import PrefloopError
from clients.interval import wilson
from clients.live import LiveStreams
from clients.questions import questions
from clients.serving import DemoError, Server, interruptible
from clients.text import printable
from clients.voter import TASTES, Answer, StreamBrokenError, Taste, Voter, ask

MAX_TOKENS = 64
FLIP_RATE = 0.1
CONCURRENCY = 16
MORE_VOTES = 100
SHOWN = 4
LEARNER_SECONDS = 780
SWAP_SECONDS = 120
POLL_SECONDS = 0.3
# The learner's last finished stage from which on the swap is near. Streams all through its training would take the
# learner's cores away.
NEAR_THE_SWAP = ("gate", "publish", "activate")


@dataclass(frozen=True)
class Plan:
    """What the demo does: how many votes, how many questions before and after, and whose taste."""

    taste: Taste
    votes: int
    held_out: int
    seed: int
    model: str | None


@dataclass
class Run:
    """What the demo found, filled in as it goes; `seconds` by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    before: list[Answer] = field(default_factory=list)
    after: list[Answer] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    streams: int = 0
    crossing: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def demo(plan: Plan, data_dir: Path, console: Console) -> None:
    """The loop once."""
    run = Run()
    asked = questions(plan.seed)
    held_out, voted = asked[: plan.held_out], asked[plan.held_out :]
    voter = Voter(plan.taste, flip_rate=FLIP_RATE, max_tokens=MAX_TOKENS, seed=plan.seed)

    say(console, "1", f"a server on {data_dir}")
    with run.stage("server"), console.status("starting") as status:
        server = Server(data_dir, plan.model, lambda line: status.update(Text(line)))
        server.start()
    with server, Client(server.address, user="voter") as client:
        say(console, "2", f"the taste: {plan.taste.sentence}; {FLIP_RATE:.0%} of the votes are flipped")
        with run.stage("before"):
            run.before = ask_all(console, client, held_out, "asking, before")
            # The learner practises on what users asked; these questions must stay new to it.
            forget(client, [answer.conversation_id for answer in run.before])
        with run.stage("votes"):
            cast(console, client, voter, voted[: plan.votes])
        say(console, "3", "one round of the learner; the server goes on serving")
        learn(console, client, data_dir, run)
        if run.report["state"] != "promoted":
            console.print(f"Refused: {run.report['sentence']}")
            say(console, "3", f"{MORE_VOTES} more votes, and once more")
            with run.stage("votes"):
                cast(console, client, voter, voted[plan.votes : plan.votes + MORE_VOTES])
            learn(console, client, data_dir, run)
        if run.report["state"] != "promoted":
            raise DemoError(f"The learner refused twice, the last time with: {run.report['sentence']}")
        say(console, "4", "the swap")
        version = run.report["policy_version"]
        with run.stage("swap"):
            wait_until_served(client, version)
        show_swap(console, run, version)
        say(console, "5", "the same questions again")
        with run.stage("after"):
            run.after = ask_all(console, client, held_out, "asking, after")
        if others := {answer.policy_version for answer in run.after} - {version}:
            raise DemoError(f"{', '.join(sorted(others))} answered after the swap, not {version}.")
        with console.status("stopping the server"), run.stage("stop"):
            server.stop()
    show(console, plan, held_out, run)


def cast(console: Console, client: Client, voter: Voter, asked: Sequence[str]) -> None:
    """Votes on one comparison per question."""
    with bar(console, "voting", len(asked)) as advance:
        votes = voter.vote_on(client, asked, concurrency=CONCURRENCY, on_vote=advance)
    console.print(f"{votes.a_or_b} choices ({votes.flipped} flipped), {votes.ties} ties")


def ask_all(console: Console, client: Client, asked: Sequence[str], title: str) -> list[Answer]:
    """One answer per question, in order; the seeds are the questions' places."""
    with bar(console, title, len(asked)) as advance, ThreadPoolExecutor(CONCURRENCY) as pool:

        def one(seed: int) -> Answer:
            answer = ask(client, asked[seed], max_tokens=MAX_TOKENS, seed=seed)
            advance()
            return answer

        return list(pool.map(one, range(len(asked))))


def forget(client: Client, conversation_ids: Sequence[str]) -> None:
    """Deletes conversations."""
    for conversation_id in conversation_ids:
        client.delete_conversation(conversation_id)


def learn(console: Console, client: Client, data_dir: Path, run: Run) -> None:
    """`learner run-once` as a process of its own, its progress on our stderr; live streams around the swap.

    Sets `run.report`, `run.streams` and `run.crossing`.
    """
    result = data_dir / "demo-round.json"
    command = [sys.executable, "-m", "learner.cli", "run-once", "--data-dir", str(data_dir), "--json"]
    live = LiveStreams(client)
    earlier = {round_.round_id for round_ in client.rounds()}
    with run.stage("round"), result.open("w") as output:
        learner = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output)
        try:
            end = time.monotonic() + LEARNER_SECONDS
            while learner.poll() is None:
                if time.monotonic() > end:
                    raise DemoError(f"The learner did not finish within {LEARNER_SECONDS} s.")
                if not live.running and near_the_swap(client, earlier):
                    live.start()
                time.sleep(POLL_SECONDS)
        finally:
            if learner.poll() is None:
                learner.terminate()
                learner.wait()
            answers = live.stop()
    if learner.returncode:
        raise DemoError("The learner failed; what it said stands above.")
    run.report = json.loads(result.read_text().splitlines()[-1])
    run.streams = len(answers)
    run.crossing = [spans for answer in answers if (spans := crossing(client, answer))]
    # Long questions of ours that the learner must not practise on either.
    forget(client, [answer.conversation_id for answer in answers])


def near_the_swap(client: Client, earlier: set[str]) -> bool:
    """Whether the round that runs now has only its last, short stages before it."""
    newest = next(client.rounds(), None)
    return newest is not None and newest.round_id not in earlier and newest.stage in NEAR_THE_SWAP


def crossing(client: Client, answer: Answer) -> str:
    """ "v0000 for tokens 0-41, v0001 for 42-299" of an answer that two versions made; empty for any other."""
    spans = client.conversation(answer.conversation_id).turns[0].response.spans
    if len({span.policy_version for span in spans}) < 2:
        return ""
    return ", ".join(f"{span.policy_version} made tokens {span.start}-{span.end - 1}" for span in spans)


def wait_until_served(client: Client, version: str) -> None:
    """Returns once `version` is active and every server has loaded it."""
    end = time.monotonic() + SWAP_SECONDS
    while True:
        active = client.active_policy()
        if active.policy.version != version:
            raise DemoError(f"{active.policy.version} is active after the round, not {version}.")
        if active.replicas and all(replica.loaded_version == version for replica in active.replicas):
            return
        if time.monotonic() > end:
            errors = [replica.error for replica in active.replicas if replica.error]
            raise DemoError(f"The server did not load {version} in {SWAP_SECONDS} s. {' '.join(errors)}".strip())
        time.sleep(POLL_SECONDS)


# Showing


def say(console: Console, number: str, text: str) -> None:
    console.print(Text(f"\n[{number}/5] {text}", style="bold"))


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Callable[[], None]]:
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description:<16}"), *columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def show_swap(console: Console, run: Run, version: str) -> None:
    console.print(f"{version} serves. {run.streams} long streams ran around the swap; none failed or lost text.")
    for spans in run.crossing:
        console.print(f"One stream went through it: {spans}.", highlight=False)
    if not run.crossing:
        console.print("None of them happened to be open at the swap itself.")


def show(console: Console, plan: Plan, held_out: Sequence[str], run: Run) -> None:
    """The closing figures."""
    table = Table(title="The same questions and seeds (the first few)", show_lines=True, expand=True)
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1)
    for question, before, after in list(zip(held_out, run.before, run.after, strict=True))[:SHOWN]:
        table.add_row(*(Text.assemble((f"{question}\n", "bold"), printable(one.text)) for one in (before, after)))
    console.print(table)

    wins, ties = outcome(plan.taste, run.before, run.after)
    n = len(held_out)
    low, high = wilson(wins + ties / 2, n)
    chosen = run.report["metrics"]["gate"]["chosen"]
    figures = Table(show_header=False, box=None, pad_edge=False)
    figures.add_column(style="bold", no_wrap=True)
    figures.add_column(overflow="fold")
    figures.add_row("taste", Text(plan.taste.sentence))
    figures.add_row(
        "win rate by the taste",
        f"{(wins + ties / 2) / n:.2f}, 95 % interval [{low:.2f}, {high:.2f}]".replace("[", r"\[")
        + f": {wins} won, {ties} tied, {n - wins - ties} lost",
    )
    figures.add_row("KL to the reference", f"{chosen['kl']:.1f} nats an answer, as the learner measured it")
    figures.add_row("seconds", seconds_words(run.seconds))
    if learner_seconds := run.report["metrics"].get("seconds"):
        figures.add_row("of the last round", seconds_words(learner_seconds))
    figures.add_row("in all", f"{sum(run.seconds.values()):.0f} s")
    console.print(figures)


def outcome(taste: Taste, before: Sequence[Answer], after: Sequence[Answer]) -> tuple[int, int]:
    """(wins, ties) of the answers after, question by question."""
    scores = [(taste.score(one), taste.score(other)) for one, other in zip(after, before, strict=True)]
    return sum(new > old for new, old in scores), sum(new == old for new, old in scores)


def seconds_words(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    data_dir: Annotated[Path | None, typer.Option(help="A fresh directory to keep. Default: a temporary one.")] = None,
    model: Annotated[str | None, typer.Option(help="A Hugging Face directory or id. Default: the server's.")] = None,
    taste: Annotated[str, typer.Option(help=f"What the voter likes: {', '.join(TASTES)}.")] = "short",
    votes: Annotated[int, typer.Option(min=1, max=250, help="Comparisons to vote on.")] = 150,
    held_out: Annotated[int, typer.Option(min=1, max=85, help="Questions before and after.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the questions' order and of the flipped votes.")] = 0,
) -> None:
    """Serve, vote, learn, swap, and compare: the whole loop once, for real."""
    if taste not in TASTES:
        raise typer.BadParameter(f"there are {', '.join(TASTES)}", param_hint="--taste")
    if data_dir and data_dir.exists() and any(data_dir.iterdir()):
        raise typer.BadParameter("the directory is not empty", param_hint="--data-dir")
    directory = data_dir or Path(tempfile.mkdtemp(prefix="prefloop-demo-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with interruptible():
            demo(Plan(TASTES[taste], votes, held_out, seed, model), directory.resolve(), Console())
    except (PrefloopError, StreamBrokenError, DemoError) as error:
        sys.exit(f"demo: {error} The server's log and all data are in {directory}.")
    except KeyboardInterrupt:
        sys.exit(f"demo: stopped. The data is in {directory}.")
    if data_dir is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    app()

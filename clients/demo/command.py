"""The demo's command line: flags, data directory and exit messages."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from clients.demo.loop import demo
from clients.demo.plan import Plan
from clients.demo.processes import DemoError, interruptible
from clients.demo.record import FinalError, Record
from clients.demo.time_limit import OverdueError
from clients.demo.voter import TASTES, StreamBrokenError
from clients.errors import PrefloopError

DIRECTORY = Path("demo-data")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    data_dir: Annotated[
        Path | None, typer.Option(help=f"A directory to keep. Default: {DIRECTORY}, removed after success.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A Hugging Face directory or id. Default: the server's.")] = None,
    taste: Annotated[str, typer.Option(help=f"What the voter likes: {', '.join(TASTES)}.")] = "short",
    votes: Annotated[int, typer.Option(min=1, max=250, help="Comparisons to vote on.")] = 150,
    held_out: Annotated[int, typer.Option(min=1, max=85, help="Questions to ask before and after.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the questions' order and the flipped votes.")] = 0,
) -> None:
    """Serve, vote, learn, swap, and compare: the whole loop once, for real.

    A run that failed or was stopped keeps its progress; the next run with the same flags resumes from it. With a
    --data-dir, `server serve` on it goes on from there: ten demonstrations of one style (/demonstrate in `chat`) and
    `learner sft` change the answers to other questions."""
    if taste not in TASTES:
        raise typer.BadParameter(f"choose one of {', '.join(TASTES)}", param_hint="--taste")
    directory = (data_dir or DIRECTORY).resolve()
    kept = f"Progress is saved in {directory}; run the same command to resume."
    try:
        with interruptible(), Record.opened(directory, Plan(taste, votes, held_out, seed, model)) as record:
            demo(record, Console())
        if data_dir is None:
            shutil.rmtree(directory)
    except FinalError as error:
        sys.exit(f"demo: {error}")
    except (PrefloopError, StreamBrokenError, DemoError, OverdueError) as error:
        sys.exit(f"demo: {error} {kept}")
    except KeyboardInterrupt:
        sys.exit(f"demo: stopped. {kept}")

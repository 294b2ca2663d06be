"""The `learner` command line: each command builds its settings from flags and calls its function.

Heavy imports are deferred until a command runs.
"""

import json
import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from learner.cli_rounds import run_once, sft
from learner.cli_settings import DataDir, Json, Reason, fail, load_settings, say, settings_with_data
from learner.process import STOPPED
from server.shared.errors import ServiceError
from server.shared.printable import printable


class ImportFormat(StrEnum):
    """The formats of files of preferences."""

    TRL_PREFERENCE = "trl-preference"


app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Turns votes into a better policy."
)
app.command("run-once")(run_once)
app.command("sft")(sft)


@app.command()
def judge(data_dir: DataDir = None) -> None:
    """Let a model choose between stored answers. Its choices train, as far as it agrees with people.

    The model is at an OpenAI-compatible endpoint (judge.url, judge.model), on this machine unless judge.host names
    another: users' texts are sent there. A run that was stopped is continued by the next one."""
    settings = settings_with_data(data_dir)
    from rich.console import Console

    from learner.ops.judge_run import run_judge

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        say(lambda: run_judge(settings, Console(stderr=True)))
    except KeyboardInterrupt:
        typer.echo("learner: Stopped. The next `learner judge` continues.", err=True)
        raise SystemExit(STOPPED) from None


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="JSON lines or Parquet.", exists=True, dir_okay=False)],
    form: Annotated[
        ImportFormat, typer.Option("--format", help="`trl-preference`: prompt, chosen, rejected.")
    ] = ImportFormat.TRL_PREFERENCE,
    name: Annotated[str, typer.Option(help="The import's name. Default: the file's.")] = "",
    data_dir: DataDir = None,
) -> None:
    """Import preferences of other people, which a reward model may follow.

    They never judge, and count as far as they help to predict the votes of people here. Each import is removed as
    one."""
    settings = settings_with_data(data_dir)
    from learner.ops.import_preferences import import_preferences

    say(lambda: import_preferences(settings, file, name))


@app.command()
def imports(
    remove: Annotated[Optional[str], typer.Option(help="Delete the import of this name.", metavar="NAME")] = None,
    data_dir: DataDir = None,
) -> None:
    """List what was imported, or remove an import."""
    settings = settings_with_data(data_dir)
    from learner.ops.import_preferences import list_imports, remove_import

    say(lambda: list_imports(settings) if remove is None else remove_import(settings, remove))


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="For example v0007. A rejected version can be promoted too.")],
    data_dir: DataDir = None,
    reason: Reason = "",
) -> None:
    """Make a version the active one, whatever the gate decided. Who did it and when is recorded."""
    settings = settings_with_data(data_dir)
    from learner.ops.manual_decisions import promote as move

    say(lambda: move(settings, version, reason))


@app.command()
def rollback(
    version: Annotated[Optional[str], typer.Argument(help="Default: the previously active version.")] = None,
    data_dir: DataDir = None,
    reason: Reason = "",
) -> None:
    """Go back to a version that was active before. Who did it and when is recorded."""
    settings = settings_with_data(data_dir)
    from learner.ops.manual_decisions import rollback as move

    say(lambda: move(settings, version, reason))


@app.command()
def rebase(
    model: Annotated[str, typer.Option(help="`smollm2`, a Hugging Face directory or id.")],
    data_dir: DataDir = None,
    reason: Reason = "",
) -> None:
    """Change the model and keep all votes. Then restart the servers with the same --model.

    The model becomes the reference of a new lineage, which the next round trains on all votes. If it was the reference
    before, the version of it that was served last becomes active again. The previous model's versions stay, to go back
    to with `learner rollback`. A run that was stopped is continued by the next one."""
    settings = settings_with_data(data_dir)
    from learner.process import set_environment

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    set_environment(settings)
    from learner.ops.rebase import rebase as move

    try:
        say(lambda: move(settings, model, reason, lambda line: typer.echo(printable(line))))
    except KeyboardInterrupt:
        typer.echo("learner: Stopped. The next `learner rebase` continues.", err=True)
        raise SystemExit(STOPPED) from None


@app.command()
def trace(
    version: Annotated[Optional[str], typer.Argument(help="For example v0007.")] = None,
    vote: Annotated[Optional[str], typer.Option(help="A feedback id, instead of a version.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show which votes and which reward model made a version, or which versions a vote went into."""
    settings = settings_with_data(data_dir)
    if (version is None) == (vote is None):
        fail("Give a version, or --vote with a feedback id.")
    from learner.ops.trace import trace_version, trace_vote

    def show() -> str:
        found = trace_vote(settings.data_dir, vote) if vote else trace_version(settings.data_dir, str(version))
        return json.dumps(found.record) if as_json else "\n".join(found.lines)

    say(show)


@app.command()
def status(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Show the served version, the last round and how many votes are new."""
    settings = load_settings(data_dir=data_dir)
    from learner.ops.status import status as read

    def show() -> str:
        found = read(settings.data_dir, settings.ab_test_voters, settings.ab_test_user_votes)
        lines = found.pop("lines")
        return json.dumps(found) if as_json else "\n".join(f"{name:>12}  {sentence}" for name, sentence in lines)

    say(show)


@app.command()
def users(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Show how each user votes: how many, how fast, which slot, and agreement with others; suspicious users first.

    Each test is corrected for the number of users, at 5 %: if nobody cheats, the chance that it suspects anybody is one
    in twenty."""
    settings = settings_with_data(data_dir)
    from dataclasses import asdict

    from rich.console import Console

    from learner.process import set_environment

    set_environment(settings)
    from learner.ops.users import read_users
    from learner.ops.users_table import print_users

    try:
        found = read_users(settings)
    except (ServiceError, RuntimeError, ValueError, OSError) as error:
        fail(str(error))
    if as_json:
        print(json.dumps([asdict(user) for user in found]))
    else:
        print_users(found, Console())


@app.command()
def quarantine(
    user: Annotated[str, typer.Argument(help="The user's id, as shown by `learner users`.")],
    lift: Annotated[bool, typer.Option("--lift", help="Let the user's votes count again.")] = False,
    data_dir: DataDir = None,
    reason: Annotated[str, typer.Option(help="Stored with the user's history.")] = "",
) -> None:
    """Leave a user's votes out of future rounds. Who did it, when and why is recorded. No votes are deleted."""
    settings = settings_with_data(data_dir)
    from learner.ops.manual_decisions import quarantine as set_apart

    say(lambda: set_apart(settings, user, reason, lift=lift))


@app.command("report")
def report_round(
    round_id: Annotated[Optional[str], typer.Argument(metavar="ROUND", help="Default: the newest round.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Write a round's HTML report: its metrics, its curves, answers before and after."""
    settings = settings_with_data(data_dir)
    from learner.ops.report_page.report_page import write_report

    say(lambda: str(write_report(settings.data_dir, round_id)))


@app.command("serve-scores")
def serve_scores(
    data_dir: DataDir = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on loopback; 0 picks a free one.")] = 50052,
) -> None:
    """Serve the newest reward model's scores over gRPC, for servers that choose which answers to compare."""
    settings = settings_with_data(data_dir)
    import asyncio

    from learner.process import set_environment

    set_environment(settings)
    from learner.ops.score_server import serve_scores as serve

    try:
        asyncio.run(serve(settings, port, typer.echo))
    except RuntimeError as error:
        fail(f"Port {port} cannot be used: {error}.")


@app.command()
def schedule(
    data_dir: DataDir = None,
    cron: Annotated[
        Optional[str],
        typer.Option(help="Five cron fields, or @daily. Default: 0 3 * * *, every night at three."),
    ] = None,
    every: Annotated[Optional[float], typer.Option(help="Minutes between rounds, instead of --cron.")] = None,
    on_request: Annotated[
        bool, typer.Option("--on-request", help="Start rounds only when RequestRound asks for one.")
    ] = False,
) -> None:
    """Run rounds by the clock or when RequestRound asks for one, each in a separate process, until stopped."""
    when = {name: value for name, value in {"cron": cron, "interval_minutes": every}.items() if value is not None}
    # A time given as a flag overrides `on_request` from the settings.
    clock = {"on_request": on_request} if on_request or when else {}
    settings = load_settings(data_dir=data_dir, schedule={**when, **clock} or None)
    from learner.ops.schedule import RoundScheduler

    try:
        scheduler = RoundScheduler(
            settings.schedule, settings.data_dir, lambda line: typer.echo(printable(line)), settings.sft.min_new
        )
    except ValueError as error:
        fail(f"{error}.")
    scheduler.run()


def main() -> None:
    from server.shared.program import run

    run("learner", app)


if __name__ == "__main__":
    main()

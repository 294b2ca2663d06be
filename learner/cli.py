"""The `learner` command line: each command builds its settings from flags and calls its function.

Heavy imports are deferred until a command runs.
"""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from learner.process import STOPPED
from server.shared.errors import ServiceError
from server.shared.printable import printable

if TYPE_CHECKING:
    from learner.round.report import Report
    from learner.settings import LearnerSettings

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Turns votes into a better policy."
)

DataDir = Annotated[Optional[Path], typer.Option(help="The data directory. Default: ./data.")]
Reason = Annotated[str, typer.Option(help="Stored with the version's history.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@app.command("run-once")
def run_once(
    data_dir: DataDir = None,
    as_json: Json = False,
    train: Annotated[Optional[str], typer.Option(help="`lora` (default) or `full`.")] = None,
    improver: Annotated[Optional[str], typer.Option(help="`ppo` (default), `rloo` or `dpo`.")] = None,
    steps: Annotated[Optional[int], typer.Option(help="Maximum number of training steps.")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Seed of every random draw. Default: 0.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait while another learner is running.")] = False,
    report_file: Annotated[
        Optional[Path], typer.Option("--report", help="Write the result as JSON to this file, also if the round fails.")
    ] = None,
) -> None:
    """Run one round, or resume one that was stopped: fit, improve, judge, publish, activate.

    Every setting is also a PREFLOOP_* variable or in prefloop.toml. Exits with 0 if there was nothing to learn. SIGTERM
    and Ctrl-C stop the round; the next run resumes it."""
    policy = None if train is None else {"train": train}
    settings = _settings(data_dir=data_dir, policy=policy, improver=improver, seed=seed)
    if steps is not None:
        training = {settings.improver: {"steps": steps}}
        settings = _settings(data_dir=data_dir, policy=policy, improver=improver, seed=seed, **training)
    report = _run_round(settings, wait, report_file)
    from rich.console import Console

    from learner.round.report import print_report

    print_report(report, Console(stderr=as_json))
    if report.round_id:
        from learner.ops.report_page.report_page import write_report

        write_report(settings.data_dir, report.round_id)
    if as_json:
        print(json.dumps(report.to_json()))
    sys.stdout.flush()


def _run_round(settings: "LearnerSettings", wait: bool, report_file: Path | None) -> "Report":
    """Prepares this process and runs the round; writes the result to the file, too."""
    from learner.progress import Stages

    stages = Stages()
    with stages.stage("start", "loading the libraries"):
        from learner.process import give_way, keep_freed_memory, set_environment

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        set_environment(settings)
        keep_freed_memory()
        give_way(settings.nice, settings.threads)

        from learner.round.report import Report
        from learner.round.run import run_once as run

    def keep(report: Report) -> None:
        if report_file:
            report_file.write_text(json.dumps(report.to_json()), encoding="utf-8")

    try:
        report = run(settings, stages, wait=wait)
    except KeyboardInterrupt:
        typer.echo("learner: Stopped. The next `learner run-once` resumes the round.", err=True)
        raise SystemExit(STOPPED) from None
    except Exception as error:
        keep(Report("failed", str(error) or type(error).__name__))
        if isinstance(error, ServiceError):
            _fail(str(error))
        if not isinstance(error, (RuntimeError, ValueError, OSError, ArithmeticError)):
            raise
        _fail(f"The round failed and the served policy is unchanged: {error}")
    keep(report)
    return report


@app.command()
def judge(data_dir: DataDir = None) -> None:
    """Let a model choose between stored answers. Its choices train, as far as it agrees with people.

    The model is at an OpenAI-compatible endpoint (judge.url, judge.model), on this machine unless judge.host names
    another: users' texts are sent there. A run that was stopped is continued by the next one."""
    settings = _settings_with_data(data_dir)
    from rich.console import Console

    from learner.ops.judge_run import run_judge

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _say(lambda: run_judge(settings, Console(stderr=True)))
    except KeyboardInterrupt:
        typer.echo("learner: Stopped. The next `learner judge` continues.", err=True)
        raise SystemExit(STOPPED) from None


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="For example v0007. A rejected version can be promoted too.")],
    data_dir: DataDir = None,
    reason: Reason = "",
) -> None:
    """Make a version the active one, whatever the gate decided. Who did it and when is recorded."""
    settings = _settings_with_data(data_dir)
    from learner.ops.manual_decisions import promote as move

    _say(lambda: move(settings, version, reason))


@app.command()
def rollback(
    version: Annotated[Optional[str], typer.Argument(help="Default: the previously active version.")] = None,
    data_dir: DataDir = None,
    reason: Reason = "",
) -> None:
    """Go back to a version that was active before. Who did it and when is recorded."""
    settings = _settings_with_data(data_dir)
    from learner.ops.manual_decisions import rollback as move

    _say(lambda: move(settings, version, reason))


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
    settings = _settings_with_data(data_dir)
    from learner.process import set_environment

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    set_environment(settings)
    from learner.ops.rebase import rebase as move

    try:
        _say(lambda: move(settings, model, reason, lambda line: typer.echo(printable(line))))
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
    settings = _settings_with_data(data_dir)
    if (version is None) == (vote is None):
        _fail("Give a version, or --vote with a feedback id.")
    from learner.ops.trace import trace_version, trace_vote

    def show() -> str:
        found = trace_vote(settings.data_dir, vote) if vote else trace_version(settings.data_dir, str(version))
        return json.dumps(found.record) if as_json else "\n".join(found.lines)

    _say(show)


@app.command()
def status(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Show the served version, the last round and how many votes are new."""
    settings = _settings(data_dir=data_dir)
    from learner.ops.status import status as read

    def show() -> str:
        found = read(settings.data_dir, settings.ab_test_voters, settings.ab_test_user_votes)
        lines = found.pop("lines")
        return json.dumps(found) if as_json else "\n".join(f"{name:>12}  {sentence}" for name, sentence in lines)

    _say(show)


@app.command()
def users(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Show how each user votes: how many, how fast, which slot, and agreement with others; suspicious users first.

    Each test is corrected for the number of users, at 5 %: if nobody cheats, the chance that it suspects anybody is one
    in twenty."""
    settings = _settings_with_data(data_dir)
    from dataclasses import asdict

    from rich.console import Console

    from learner.process import set_environment

    set_environment(settings)
    from learner.ops.users import read_users
    from learner.ops.users_table import print_users

    try:
        found = read_users(settings)
    except (ServiceError, RuntimeError, ValueError, OSError) as error:
        _fail(str(error))
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
    settings = _settings_with_data(data_dir)
    from learner.ops.manual_decisions import quarantine as set_apart

    _say(lambda: set_apart(settings, user, reason, lift=lift))


@app.command("report")
def report_round(
    round_id: Annotated[Optional[str], typer.Argument(metavar="ROUND", help="Default: the newest round.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Write a round's HTML report: its metrics, its curves, answers before and after."""
    settings = _settings_with_data(data_dir)
    from learner.ops.report_page.report_page import write_report

    _say(lambda: str(write_report(settings.data_dir, round_id)))


@app.command("serve-scores")
def serve_scores(
    data_dir: DataDir = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on loopback; 0 picks a free one.")] = 50052,
) -> None:
    """Serve the newest reward model's scores over gRPC, for servers that choose which answers to compare."""
    settings = _settings_with_data(data_dir)
    import asyncio

    from learner.process import set_environment

    set_environment(settings)
    from learner.ops.score_server import serve_scores as serve

    try:
        asyncio.run(serve(settings, port, typer.echo))
    except RuntimeError as error:
        _fail(f"Port {port} cannot be used: {error}.")


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
    settings = _settings(data_dir=data_dir, schedule={**when, **clock} or None)
    from learner.ops.schedule import RoundScheduler

    try:
        scheduler = RoundScheduler(settings.schedule, settings.data_dir, lambda line: typer.echo(printable(line)))
    except ValueError as error:
        _fail(f"{error}.")
    scheduler.run()


def _settings(**flags: Any) -> "LearnerSettings":
    from learner.settings import LearnerSettings
    from server.shared.settings_base import explain

    try:
        return LearnerSettings.load(**flags)
    except (ValueError, OSError) as error:
        _fail(explain(error))


def _settings_with_data(data_dir: Path | None) -> "LearnerSettings":
    """Loads settings for commands that need data. Fails if no server has started yet."""
    from server.store.store import Store

    settings = _settings(data_dir=data_dir)
    if not Store.exists(settings.data_dir):
        _fail(f"There is no data in {str(settings.data_dir)!r} yet: start `server serve` first.")
    return settings


def _say(sentence: Callable[[], str]) -> None:
    try:
        typer.echo(printable(sentence()))
    except ServiceError as error:
        _fail(str(error))


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"learner: {printable(sentence)}", err=True)
    raise SystemExit(1)


def main() -> None:
    from server.shared.program import run

    run("learner", app)


if __name__ == "__main__":
    main()

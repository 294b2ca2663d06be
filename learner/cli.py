"""The command `learner`: flags to settings to a call. Heavy imports wait until a command runs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from server.errors import ServiceError

if TYPE_CHECKING:
    from learner.settings import LearnerSettings

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Turns votes into a better policy."
)

DataDir = Annotated[Optional[Path], typer.Option(help="Everything that is kept. Default: ./data.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@app.command("run-once")
def run_once(
    data_dir: DataDir = None,
    as_json: Json = False,
    train: Annotated[Optional[str], typer.Option(help="`lora` (default) or `full`.")] = None,
    steps: Annotated[Optional[int], typer.Option(help="PPO steps at most.")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of every random draw. Default: 0.")] = None,
) -> None:
    """Run one round, or go on with one that was stopped: fit, improve, judge, publish, activate.

    Every setting is also a PREFLOOP_* variable or in prefloop.toml. Ends with 0 where there was nothing to learn."""
    ppo = {name: value for name, value in {"train": train, "steps": steps}.items() if value is not None}
    settings = _settings(data_dir=data_dir, ppo=ppo or None, seed=seed)
    from learner.memory import keep_freed_memory
    from learner.rollout import set_environment

    set_environment(settings)
    keep_freed_memory()
    from dataclasses import asdict

    from rich.console import Console

    from learner.progress import Stages
    from learner.report import print_report
    from learner.round import run_once as run

    try:
        report = run(settings, Stages())
    except ServiceError as error:
        _fail(str(error))
    except Exception as error:
        if not isinstance(error, (RuntimeError, ValueError, OSError, ArithmeticError)):
            raise
        _fail(f"The round failed and the served policy is unchanged: {error}")
    print_report(report, Console(stderr=as_json))
    if report.round_id:
        from learner.page import write_report

        write_report(settings.data_dir, report.round_id)
    if as_json:
        print(json.dumps(asdict(report)))
    sys.stdout.flush()


@app.command()
def status(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Show what is served, what was learned from, and what waits."""
    settings = _settings(data_dir=data_dir)
    from learner.status import status as read

    try:
        found = read(settings.data_dir)
    except ServiceError as error:
        _fail(str(error))
    if as_json:
        print(json.dumps({name: value for name, value in found.items() if name != "lines"}))
        return
    for name, sentence in found["lines"]:
        typer.echo(f"{name:>12}  {sentence}")


@app.command("report")
def report_round(
    round_id: Annotated[Optional[str], typer.Argument(metavar="ROUND", help="Default: the newest.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Draw a round's curves (PNG) and write its page (HTML): figures, curves, answers before and after."""
    settings = _settings_with_data(data_dir)
    from learner.page import write_report

    try:
        for path in write_report(settings.data_dir, round_id):
            typer.echo(path)
    except ServiceError as error:
        _fail(str(error))


@app.command("serve-scores")
def serve_scores(
    data_dir: DataDir = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On loopback; 0 picks a free one.")] = 50052,
) -> None:
    """Serve the newest reward model's scores over gRPC, for servers that choose which answers to compare."""
    settings = _settings_with_data(data_dir)
    import asyncio

    from learner.score_server import serve_scores as serve

    try:
        asyncio.run(serve(settings.data_dir, settings.max_model_len, port, typer.echo))
    except RuntimeError as error:
        _fail(f"The port {port} cannot be used: {error}.")


@app.command()
def schedule(
    data_dir: DataDir = None,
    cron: Annotated[
        Optional[str], typer.Option(help="Five cron fields. Default: 0 3 * * *, every night at three.")
    ] = None,
) -> None:
    """Run a round whenever the clock says so, each in a process of its own, until stopped."""
    settings = _settings(data_dir=data_dir, schedule_cron=cron)
    from learner.schedule import run_scheduler

    try:
        run_scheduler(settings.schedule_cron, settings.data_dir)
    except ValueError as error:
        _fail(f"--cron {settings.schedule_cron!r} is not a cron line: {error}.")
    except (KeyboardInterrupt, SystemExit):
        return


def _settings(**flags: Any) -> "LearnerSettings":
    from pydantic import ValidationError

    from learner.settings import LearnerSettings

    try:
        return LearnerSettings.load(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"The setting {'.'.join(map(str, first['loc']))} is not valid: {first['msg']}.")


def _settings_with_data(data_dir: Path | None) -> "LearnerSettings":
    """For commands that have nothing to say where no server has started yet."""
    settings = _settings(data_dir=data_dir)
    if not (settings.data_dir / "prefloop.db").exists():
        _fail(f"There is no data in {str(settings.data_dir)!r} yet: start `server serve` first.")
    return settings


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"learner: {sentence}", err=True)
    raise SystemExit(1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()

"""The commands that run a round. Heavy imports are deferred until a command runs."""

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from learner.cli_settings import DataDir, Json, fail, load_settings
from learner.process import STOPPED
from server.shared.errors import ServiceError

if TYPE_CHECKING:
    from learner.round.report import Report
    from learner.settings import LearnerSettings
    from server.store.learning.records import RoundKind

ReportFile = Annotated[
    Optional[Path], typer.Option("--report", help="Write the result as JSON to this file, also if the round fails.")
]
Train = Annotated[Optional[str], typer.Option(help="`lora` (default) or `full`.")]
Seed = Annotated[Optional[int], typer.Option(help="Seed of every random draw. Default: 0.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait while another learner is running.")]


def run_once(
    data_dir: DataDir = None,
    as_json: Json = False,
    train: Train = None,
    improver: Annotated[Optional[str], typer.Option(help="`ppo` (default), `rloo` or `dpo`.")] = None,
    steps: Annotated[Optional[int], typer.Option(help="Maximum number of training steps.")] = None,
    workers: Annotated[Optional[int], typer.Option(help="Processes that train together. Default: the round's.")] = None,
    ray: Annotated[Optional[str], typer.Option(help="Address of a Ray cluster that runs them.")] = None,
    seed: Seed = None,
    wait: Wait = False,
    report_file: ReportFile = None,
) -> None:
    """Run one round, or resume one that was stopped: fit, improve, judge, publish, activate.

    If enough new demonstrations and corrections wait (sft.min_new), a round learns from them first, as `learner sft`
    does. Every setting is also a PREFLOOP_* variable or in prefloop.toml. Exits with 0 if there was nothing to learn.
    SIGTERM and Ctrl-C stop the round; the next run resumes it."""
    policy = None if train is None else {"train": train}
    apart = {name: value for name, value in (("count", workers), ("ray", ray)) if value is not None} or None
    flags = {"data_dir": data_dir, "policy": policy, "improver": improver, "seed": seed, "workers": apart}
    settings = load_settings(**flags)
    if steps is not None:
        settings = load_settings(**flags, **{settings.improver: {"steps": steps}})
    _show(_run_round(settings, wait, report_file, "alignment"), settings, as_json)


def sft(
    data_dir: DataDir = None,
    as_json: Json = False,
    train: Train = None,
    seed: Seed = None,
    wait: Wait = False,
    report_file: ReportFile = None,
) -> None:
    """Learn from demonstrations and corrections: supervised fine-tuning of the version that serves.

    What comes of it serves if the loss on demonstrations held out falls and its answers pass the gate, and is the
    reference from then on: the next rounds start from it. Exits with 0 if there was nothing to learn. SIGTERM and
    Ctrl-C stop the round; the next run resumes it."""
    policy = None if train is None else {"train": train}
    settings = load_settings(data_dir=data_dir, policy=policy, seed=seed)
    _show(_run_round(settings, wait, report_file, "sft"), settings, as_json)


def _show(report: "Report", settings: "LearnerSettings", as_json: bool) -> None:
    """Prints the result, and writes the round's page."""
    from rich.console import Console

    from learner.round.report import print_report

    print_report(report, Console(stderr=as_json))
    if report.round_id:
        from learner.ops.report_page.report_page import write_report

        write_report(settings.data_dir, report.round_id)
    if as_json:
        print(json.dumps(report.to_json()))
    sys.stdout.flush()


def _run_round(settings: "LearnerSettings", wait: bool, report_file: Path | None, kind: "RoundKind") -> "Report":
    """Prepares this process and runs the round; writes the result to the file, too."""
    from learner.progress import Stages

    stages = Stages()
    with stages.stage("start", "loading the libraries"):
        from learner.process import give_way, keep_freed_memory, set_environment

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        set_environment(settings)
        keep_freed_memory()
        give_way(settings.nice, settings.threads)

        from learner.ops.imitate_first import both, imitate_first
        from learner.round.report import Report
        from learner.round.run import run_once as run

    def keep(report: Report) -> None:
        if report_file:
            report_file.write_text(json.dumps(report.to_json()), encoding="utf-8")

    before = None
    try:
        before = imitate_first(settings, stages.console.print) if kind == "alignment" else None
        report = both(before, run(settings, stages, wait=wait, kind=kind))
    except KeyboardInterrupt:
        typer.echo("learner: Stopped. The next run of this command resumes the round.", err=True)
        raise SystemExit(STOPPED) from None
    except Exception as error:
        keep(both(before, Report("failed", str(error) or type(error).__name__)))
        if isinstance(error, ServiceError):
            fail(str(error))
        if not isinstance(error, (RuntimeError, ValueError, OSError, ArithmeticError)):
            raise
        fail(f"The round failed and left the served policy as it was: {error}")
    keep(report)
    return report

"""What the commands of `learner` share: their settings, common options, and how they answer."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from server.shared.errors import ServiceError
from server.shared.printable import printable

if TYPE_CHECKING:
    from learner.settings import LearnerSettings

DataDir = Annotated[Optional[Path], typer.Option(help="The data directory. Default: ./data.")]
Reason = Annotated[str, typer.Option(help="Stored with the version's history.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def load_settings(**flags: Any) -> "LearnerSettings":
    from learner.settings import LearnerSettings
    from server.shared.settings_base import explain

    try:
        return LearnerSettings.load(**flags)
    except (ValueError, OSError) as error:
        fail(explain(error))


def settings_with_data(data_dir: Path | None) -> "LearnerSettings":
    """Loads settings for commands that need data. Fails if no server has started yet."""
    from server.store.store import Store

    settings = load_settings(data_dir=data_dir)
    if not Store.exists(settings.data_dir):
        fail(f"There is no data in {str(settings.data_dir)!r} yet: start `server serve` first.")
    return settings


def say(sentence: Callable[[], str]) -> None:
    try:
        typer.echo(printable(sentence()))
    except ServiceError as error:
        fail(str(error))


def fail(sentence: str) -> NoReturn:
    typer.echo(f"learner: {printable(sentence)}", err=True)
    raise SystemExit(1)

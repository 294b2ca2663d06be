"""Writes the list of all settings' names from the code. `make docs` runs it."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from clients import cli as clients
from learner.cli import app as learner
from learner.settings import LearnerSettings
from server.cli import app as server
from server.settings import ServerSettings
from server.shared import failpoints
from server.shared.variables import read_variables

ROOT = Path(__file__).parent.parent
NAMES = Path("server/shared/setting_names.py")
HEAD = '''"""The names of all settings of server, learner and clients. Made by `make docs`: write nothing here."""
'''
# Read without a flag or a settings class: by the command `chat`, by every process, by clients/node, by tests alone.
OTHERS = (clients.API_KEY, failpoints.VARIABLE, "PREFLOOP_SECONDS", "PREFLOOP_SCREENSHOTS")


def made() -> str:
    """The file's text."""
    models = (ServerSettings, LearnerSettings)
    settings = {name for model in models for name in fields(model)}
    flags = {variable for app in (server, learner, clients.app) for variable in flags_of(typer.main.get_command(app))}
    variables = read_variables(dict.fromkeys((*flags, *OTHERS), "")).keys() - settings
    old = {name for model in models for name in (*model.renamed, *model.dropped)} - settings
    return HEAD + "".join(
        f"\n# {comment}\n{constant} = {text(found)}"
        for constant, comment, found in (
            (
                "SETTINGS",
                "In prefloop.toml, `ppo.steps` as `[ppo] steps`, and as variables, as PREFLOOP_PPO__STEPS.",
                settings,
            ),
            ("VARIABLES", "As variables alone.", variables),
            ("OLD", "Names of settings that have new ones; they go with the next version.", old),
        )
    )


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every setting and every table."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


def flags_of(command: Any) -> Iterator[str]:
    """The variables of a command's flags and of those below it."""
    for option in command.params:
        if option.envvar:
            yield option.envvar
    for below in getattr(command, "commands", {}).values():
        yield from flags_of(below)


def text(names: Iterable[str]) -> str:
    lines = "".join(f'        "{name}",\n' for name in sorted(names))
    return f"frozenset(\n    {{\n{lines}    }}\n)\n"


if __name__ == "__main__":
    file = (Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT) / NAMES
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(made())

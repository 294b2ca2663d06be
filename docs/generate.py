"""Writes docs/reference.md from the code: every command, setting, RPC's role and metric. `make docs` runs it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import languages
import typer
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel

from clients.cli import app as chat
from clients.demo.command import app as demo
from learner.cli import app as learner
from learner.settings import LearnerSettings
from server.cli import app as server
from server.rpc.access import ROLES
from server.settings import ServerSettings
from server.telemetry import metrics

OUTPUT = Path(__file__).parent / "reference.md"
HEAD = """# Reference

Made from the code by `make docs`; a test fails where the two differ.
"""


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    apps = {"server": server, "learner": learner, "chat": chat, "python -m clients.demo": demo}
    for name, app in apps.items():
        parts += ["", f"## `{name}`", *commands(name, typer.main.get_command(app))]
    for name, model in (("server", ServerSettings), ("learner", LearnerSettings)):
        parts += ["", f"## Settings of the {name}", "", "| variable | default | what |", "| --- | --- | --- |"]
        parts += [f"| `{key}` | `{default}` | {text} |" for key, default, text in settings(model, "PREFLOOP_")]
    parts += ["", "## Who may call what", "", "| RPC | role | a request |", "| --- | --- | --- |"]
    parts += [f"| `{method[1:]}` | {role or 'anybody'} | {request(method)} |" for method, role in ROLES.items()]
    parts += ["", "## Metrics", "", "| name | kind | labels | what |", "| --- | --- | --- | --- |", *metric_rows()]
    return "\n".join(parts) + "\n"


def request(method: str) -> str:
    """What a call of ours needs; the others have documents of their own."""
    name = method.removeprefix(f"/{languages.PACKAGE}.")
    return f"`{languages.body(name)}`" if name != method else ""


def metric_rows() -> Iterator[str]:
    """Our own; beside them are those of the process and of Python's garbage collection."""
    for metric in vars(metrics).values():
        if isinstance(metric, (Counter, Gauge, Histogram)):
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)
            suffix = "_total" if isinstance(metric, Counter) else ""
            yield f"| `{metric._name}{suffix}` | {metric._type} | {labels} | {metric._documentation} |"


def commands(path: str, command: Any) -> Iterator[str]:
    """A table of flags for a command and for each below it."""
    yield from ("", f"`{path}`: {' '.join((command.help or '').split())}")
    options = [option for option in command.params if option.name != "help"]
    if options:
        yield from ("", "| argument | what |", "| --- | --- |")
        for option in options:
            text = getattr(option, "help", None) or "As above."
            variable = f" Variable: `{option.envvar}`." if option.envvar else ""
            yield f"| `{' '.join(option.opts)}` | {text}{variable} |"
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(f"{path} {name}", below)


def settings(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Variable, default and description of every setting, nested ones after their table."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from settings(kind, f"{prefix}{name.upper()}__")
            continue
        yield f"{prefix}{name.upper()}", str(field.get_default()), str(field.description).replace("|", r"\|")


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT).write_text(reference())

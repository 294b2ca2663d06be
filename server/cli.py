"""The command `server`: flags to settings to a call. Heavy imports wait until a command runs."""

import asyncio
import codecs
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from server.shared.errors import ServiceError
from server.shared.printable import printable
from server.shared.whole_file import whole_file
from server.store.keys import Role

if TYPE_CHECKING:
    from server.settings import ServerSettings
    from server.store.store import Store

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="The prefloop chat server."
)


keys_app = typer.Typer(no_args_is_help=True, help="API keys: who may call, and as what.")
app.add_typer(keys_app, name="keys")

DataDir = Annotated[Optional[Path], typer.Option(help="Everything that is kept. Default: ./data.")]


@app.command()
def serve(
    data_dir: DataDir = None,
    model: Annotated[Optional[str], typer.Option(help="A Hugging Face directory or id. Default: SmolLM2-135M.")] = None,
    host: Annotated[Optional[str], typer.Option(help="The address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[Optional[int], typer.Option(help="The port to listen on. Default: 50051.")] = None,
) -> None:
    """Serve chats and record votes until SIGTERM. Every setting is also a PREFLOOP_* variable or in prefloop.toml."""
    settings = _settings(data_dir=data_dir, model=model, host=host, port=port)
    import uvloop

    from server.process import serve as serve_forever
    from server.telemetry.logs import configure_logs, configure_traces

    configure_logs(settings.log_format, settings.log_level)
    configure_traces(settings.otlp_endpoint)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_forever(settings, _say))
    except ServiceError as error:
        _fail(str(error))


@app.command()
def doctor(
    data_dir: DataDir = None,
    model: Annotated[Optional[str], typer.Option(help="As for `serve`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Findings and figures as one JSON object.")] = False,
) -> None:
    """Say what this machine and this set-up are good for, and what is wrong with them; no server need run.

    Takes some seconds. Ends with 1 where something is wrong; a warning alone is no such thing."""
    try:
        from server.doctor.examine import examine
    except ImportError as error:
        _fail(f"{error.name} is not installed: `make setup`, or install prefloop with the extra `cpu` or `gpu`.")
    from server.doctor.show import show, to_json

    report = examine(data_dir=data_dir, model=model)
    if as_json:
        typer.echo(to_json(report))
    else:
        show(report)
    raise SystemExit(report.state == "wrong")


@app.command()
def backup(
    destination: Annotated[Path, typer.Argument(help="A folder that does not exist yet; it becomes a data directory.")],
    data_dir: DataDir = None,
) -> None:
    """Copy the database and all versions while server and learner run. Ends with 1 where a version is damaged."""
    settings = _settings(data_dir=data_dir)
    from server.admin.backup import back_up

    try:
        damaged = back_up(settings.data_dir, destination)
    except ServiceError as error:
        _fail(str(error))
    _say(f"backed up to {destination}")
    if damaged:
        _fail(f"The backup lacks what is damaged. {' '.join(damaged)}")


@keys_app.command()
def create(
    user: Annotated[str, typer.Option(help="Whose key it is; the same user may have several.")],
    role: Annotated[Role, typer.Option(help="`user`: chat and vote. `operator`: policies and rounds, too.")] = "user",
    data_dir: DataDir = None,
) -> None:
    """Make a key and show it, this once. A running server takes it at once."""
    with _store(data_dir) as store:
        typer.echo(store.keys.create(user, role))


@keys_app.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """List every key there ever was: its id, user and role, and since when it is good or revoked."""
    with _store(data_dir) as store:
        for key in store.keys.all():
            revoked = f"revoked {_date(key.revoke_time)}" if key.revoke_time else ""
            user = key.user or "(forgotten)"
            typer.echo(f"{key.id}  {key.role:8}  {user:20}  made {_date(key.create_time)}  {revoked}".rstrip())


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The part of the key before the dot.")],
    data_dir: DataDir = None,
) -> None:
    """Make a key useless. A running server refuses it at once."""
    with _store(data_dir) as store:
        store.keys.revoke(key_id)


@app.command("forget-user")
def forget_user(
    user: Annotated[str, typer.Argument(help="The user's name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Remove everything that is kept of a user for good, also while a server runs, and rewrite the database.

    Weights that learned from them stay as they are; it says which."""
    from server.admin.forget_user import forget

    settings = _settings(data_dir=data_dir)
    with _store(data_dir) as store:
        kept = store.deletion.look(user)
        typer.echo(f"{user}: {kept.conversations} conversations, {kept.votes} votes, and their keys.")
        if not yes:
            typer.confirm("Remove them for good?", abort=True)
        for line in forget(store, settings.data_dir, user, settings.poll_seconds):
            _say(line)


@app.command("export-user")
def export_user(
    user: Annotated[str, typer.Argument(help="The user's name.")],
    out: Annotated[Optional[Path], typer.Option(help="A file instead of stdout.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Write everything that is kept of a user as JSON lines, each an ExportUserResponse."""
    from google.protobuf.json_format import MessageToJson

    from server.rpc.export import export

    # What a terminal cannot say, or would obey, is escaped, not lost.
    plain = not out and (sys.stdout.isatty() or codecs.lookup(sys.stdout.encoding).name != "utf-8")
    opened = whole_file(out) if out else nullcontext(sys.stdout)
    with _store(data_dir) as store, opened as file:
        for part in export(store, user):
            line = MessageToJson(part, preserving_proto_field_name=True, indent=None, ensure_ascii=plain)
            file.write(line + "\n")


@app.command("compact")
def compact_data(data_dir: DataDir = None) -> None:
    """Rewrite the database, which drops what deleted rows left in its file. Writes wait meanwhile."""
    from server.admin.forget_user import compact

    with _store(data_dir):
        _say(compact(_settings(data_dir=data_dir).data_dir))


def _settings(**flags: Any) -> "ServerSettings":
    from server.settings import ServerSettings
    from server.shared.settings_base import explain

    try:
        return ServerSettings.load(**flags)
    except (ValueError, OSError) as error:
        _fail(explain(error))


@contextmanager
def _store(data_dir: Path | None) -> "Iterator[Store]":
    """The store of the data directory; what goes wrong with it is one sentence."""
    from server.store.store import Store

    try:
        store = Store.open(_settings(data_dir=data_dir).data_dir)
        try:
            yield store
        finally:
            store.close()
    except ServiceError as error:
        _fail(str(error))


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "minutes")


def _say(line: str) -> None:
    typer.echo(printable(line))
    sys.stdout.flush()


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"server: {printable(sentence)}", err=True)
    raise SystemExit(1)


def main() -> None:
    from server.shared.program import run

    run("server", app)


if __name__ == "__main__":
    main()

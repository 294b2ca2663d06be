"""The `server` command line. Each command imports heavy modules only when it runs."""

import asyncio
import codecs
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Optional

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


keys_app = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys.")
app.add_typer(keys_app, name="keys")

DataDir = Annotated[Optional[Path], typer.Option(help="The data directory. Default: ./data.")]


@app.command()
def serve(
    data_dir: DataDir = None,
    model: Annotated[Optional[str], typer.Option(help="A Hugging Face directory or id. Default: SmolLM2-135M.")] = None,
    host: Annotated[Optional[str], typer.Option(help="The address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[Optional[int], typer.Option(help="The port to listen on. Default: 50051.")] = None,
    engine: Annotated[
        Optional[bool], typer.Option("--engine/--no-engine", help="Sample answers (the default), or only take votes.")
    ] = None,
) -> None:
    """Serve chats and record votes until SIGTERM. Settings also come from PREFLOOP_* variables and prefloop.toml."""
    settings = _settings(data_dir=data_dir, model=model, host=host, port=port, engine=engine)
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
    as_json: Annotated[bool, typer.Option("--json", help="Print findings and measurements as JSON.")] = False,
) -> None:
    """Check this machine and this setup, and report problems; the server need not be running.

    Takes some seconds. Exits with 1 if something is wrong; a warning alone does not count."""
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
    destination: Annotated[Path, typer.Argument(help="A new folder, which becomes a data directory.")],
    data_dir: DataDir = None,
) -> None:
    """Copy the database and all versions while server and learner run. Exits with 1 if a version is damaged."""
    settings = _settings(data_dir=data_dir)
    from server.admin.backup import back_up

    try:
        damaged = back_up(settings.data_dir, destination)
    except ServiceError as error:
        _fail(str(error))
    _say(f"backed up to {destination}")
    if damaged:
        _fail(f"The backup is incomplete: damaged versions were left out. {' '.join(damaged)}")


@app.command()
def migrate_store(
    to: Annotated[Literal["postgres", "sqlite"], typer.Argument(help="Where the store goes.")],
    data_dir: DataDir = None,
) -> None:
    """Copy the store from the data directory to the database that `store_url` names, or back, and compare the two.
    Server and learner must be stopped. A copy that was interrupted goes on."""
    settings = _settings(data_dir=data_dir)
    from server.store.store import Store

    try:
        for table, rows in Store.migrate(settings.data_dir, to):
            _say(f"{table}: {rows} rows")
    except ServiceError as error:
        _fail(str(error))
    _say("Both have the same rows. " + ("Keep store_url set." if to == "postgres" else "Remove store_url."))


@keys_app.command()
def create(
    user: Annotated[str, typer.Option(help="The key's user; a user may have several keys.")],
    role: Annotated[
        Role,
        typer.Option(
            help="`user`: chat and vote. `application`: for users that it names. `operator`: also policies and rounds."
        ),
    ] = "user",
    data_dir: DataDir = None,
) -> None:
    """Create a key and print it once. A running server accepts it at once."""
    with _store(data_dir) as store:
        typer.echo(store.keys.create(user, role))


@keys_app.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """List every key ever created: id, user, role, and when it was created and revoked."""
    with _store(data_dir) as store:
        for key in store.keys.all():
            revoked = f"revoked {_date(key.revoke_time)}" if key.revoke_time else ""
            user = key.user or "(deleted)"
            typer.echo(f"{key.id}  {key.role:11}  {user:20}  created {_date(key.create_time)}  {revoked}".rstrip())


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The part of the key before the dot.")],
    data_dir: DataDir = None,
) -> None:
    """Revoke a key. A running server refuses it at once."""
    with _store(data_dir) as store:
        store.keys.revoke(key_id)


@app.command("forget-user")
def forget_user(
    user: Annotated[str, typer.Argument(help="The user's name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Permanently delete all data of a user, also while a server runs, and rewrite the database.

    Weights trained on the user's data stay unchanged; the command lists them."""
    from server.admin.forget_user import forget

    settings = _settings(data_dir=data_dir)
    with _store(data_dir) as store:
        kept = store.deletion.look(user)
        typer.echo(f"{user}: {kept.conversations} conversations, {kept.votes} votes, and their keys.")
        if not yes:
            typer.confirm("Delete them permanently?", abort=True)
        for line in forget(store, settings.data_dir, user, settings.poll_seconds):
            _say(line)


@app.command("export-user")
def export_user(
    user: Annotated[str, typer.Argument(help="The user's name.")],
    out: Annotated[Optional[Path], typer.Option(help="Write to this file instead of stdout.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Write all stored data of a user as JSON lines, each an ExportUserResponse."""
    from google.protobuf.json_format import MessageToJson

    from server.rpc.export import export

    # Escape characters that a terminal cannot encode or would execute.
    plain = not out and (sys.stdout.isatty() or codecs.lookup(sys.stdout.encoding).name != "utf-8")
    opened = whole_file(out) if out else nullcontext(sys.stdout)
    with _store(data_dir) as store, opened as file:
        for part in export(store, user):
            line = MessageToJson(part, preserving_proto_field_name=True, indent=None, ensure_ascii=plain)
            file.write(line + "\n")


@app.command("compact")
def compact_data(data_dir: DataDir = None) -> None:
    """Rewrite the database to drop what deleted rows left in its file. Writes wait in the meantime."""
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
    """The store of the data directory; a ServiceError ends the command with its message."""
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

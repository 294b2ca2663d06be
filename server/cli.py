"""`server serve`: flags to settings to `server.app.serve`. Heavy imports wait until a command runs."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from server.errors import ServiceError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="The prefloop chat server."
)


@app.callback()
def _root() -> None:
    """Keeps `serve` a command of its own while it is the only one."""


@app.command()
def serve(
    data_dir: Annotated[Optional[Path], typer.Option(help="Everything that is kept. Default: ./data.")] = None,
    model: Annotated[Optional[str], typer.Option(help="A Hugging Face directory or id. Default: SmolLM2-135M.")] = None,
    host: Annotated[Optional[str], typer.Option(help="The address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[Optional[int], typer.Option(help="The port to listen on. Default: 50051.")] = None,
) -> None:
    """Serve chats and record votes until SIGTERM. Every setting is also a PREFLOOP_* variable or in prefloop.toml."""
    from pydantic import ValidationError

    from server.settings import ServerSettings

    try:
        settings = ServerSettings.load(data_dir=data_dir, model=model, host=host, port=port)
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"The setting {'.'.join(map(str, first['loc'])) or 'compare_temperatures'} is not valid: {first['msg']}.")

    import logging

    import uvloop

    from server.app import serve as serve_forever

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_forever(settings, _say))
    except ServiceError as error:
        _fail(str(error))


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()


def _fail(sentence: str) -> None:
    typer.echo(f"server: {sentence}", err=True)
    raise SystemExit(1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()

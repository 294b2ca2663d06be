"""`chat`: talk to a prefloop server from the terminal."""

import getpass
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from clients.client import Client

API_KEY = "PREFLOOP_API_KEY"

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False)

Host = Annotated[str, typer.Option(envvar="PREFLOOP_HOST", help="Where the server is.")]
Port = Annotated[int, typer.Option(envvar="PREFLOOP_PORT", help="The server's port.", min=1, max=65535)]
User = Annotated[
    str, typer.Option(envvar="PREFLOOP_USER", help="Who you are, on a server without keys. Default: your login name.")
]
Ca = Annotated[
    Path | None,
    typer.Option(envvar="PREFLOOP_CA", help="PEM file of who signed the server's certificate. Default: the system's."),
]
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 50051


def main() -> None:
    """Runs the command line. Every expected failure is one sentence on stderr and exit code 1."""
    from clients.errors import PrefloopError

    try:
        app()
    except PrefloopError as error:
        sys.exit(f"chat: {error}")


@app.callback(invoke_without_command=True)
def talk(
    context: typer.Context, host: Host = DEFAULT_HOST, port: Port = DEFAULT_PORT, user: User = "", ca: Ca = None
) -> None:
    """Chat with the policy that is being served. Type /help inside for the commands.

    An API key is read from the variable PREFLOOP_API_KEY."""
    context.obj = {"host": host, "port": port, "user": user, "ca": ca}
    if context.invoked_subcommand:
        return
    from rich.console import Console

    from clients.terminal import Terminal

    with connect(host, port, user, ca) as client:
        Terminal(client, Console(), line_reader()).run()


@app.command()
def send(
    context: typer.Context,
    message: Annotated[str, typer.Argument(help="What to say; - reads it from standard input.")],
    host: Annotated[str | None, typer.Option(help="As above.")] = None,
    port: Annotated[int | None, typer.Option(help="As above.", min=1, max=65535)] = None,
    user: Annotated[str | None, typer.Option(help="As above.")] = None,
    ca: Annotated[Path | None, typer.Option(help="As above.")] = None,
    conversation: Annotated[str, typer.Option(help="Go on with this conversation's id.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 to 2; 0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats an answer of the same policy version.", min=0)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the answer has ended.")] = False,
) -> None:
    """Send one message and print the answer as it comes."""
    outer = context.obj
    text = sys.stdin.read() if message == "-" else message
    with connect(host or outer["host"], port or outer["port"], user or outer["user"], ca or outer["ca"]) as client:
        answer = stream_answer(
            client, text, conversation, temperature, max_tokens, seed, echo=None if as_json else sys.stdout.write
        )
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))


def connect(host: str, port: int, user: str, ca: Path | None = None) -> "Client":
    """A client of a server that is known to answer; raises UnavailableError without one."""
    from clients.channel import Tls
    from clients.client import Client

    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        tls = Tls(ca.read_bytes()) if ca else None
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--ca") from error
    try:
        client = Client(address, api_key=os.environ.get(API_KEY), user=user or getpass.getuser(), tls=tls)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--user") from error
    try:
        client.check()
    except BaseException:
        client.close()
        raise
    return client


def stream_answer(
    client: "Client",
    message: str,
    conversation_id: str,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
    echo: Callable[[str], object] | None,
) -> dict[str, object]:
    """Sends one message; `echo` hears the answer as it comes. Returns the whole of it with its ids, as JSON has it."""
    from prefloop.v1.chat_pb2 import ChatDelta, ChatFinished, ChatStarted, FinishReason

    answer: dict[str, object] = {}
    with client.chat(
        message, conversation_id=conversation_id, temperature=temperature, max_tokens=max_tokens, seed=seed
    ) as stream:
        for event in stream:
            match event:
                case ChatStarted():
                    answer |= {"conversation_id": event.conversation_id, "response_id": event.response_id}
                case ChatDelta() if echo:
                    echo(event.text)
                    sys.stdout.flush()
                case ChatFinished():
                    answer |= {
                        "text": event.text,
                        "finish_reason": FinishReason.Name(event.finish_reason),
                        "policy_version": event.policy_version,
                        "prompt_tokens": event.usage.prompt_tokens,
                        "completion_tokens": event.usage.completion_tokens,
                    }
    if echo:
        echo("\n")
    return answer


def line_reader() -> Callable[[str], str]:
    """Line editing with history on a terminal; plain lines from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda prompt: input()
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    return lambda prompt: session.prompt(prompt)


if __name__ == "__main__":
    main()

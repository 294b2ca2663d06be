"""`chat`: talk to a prefloop server from the terminal."""

import getpass
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from clients.channel import Tls
    from clients.client import Client
    from clients.errors import PrefloopError

API_KEY = "PREFLOOP_API_KEY"

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False)

Host = Annotated[str, typer.Option(envvar="PREFLOOP_HOST", help="The server's host.")]
Port = Annotated[int, typer.Option(envvar="PREFLOOP_PORT", help="The server's port.", min=1, max=65535)]
User = Annotated[
    str, typer.Option(envvar="PREFLOOP_USER", help="Your name on a server without keys. Default: your login name.")
]
Ca = Annotated[
    Path | None,
    typer.Option(envvar="PREFLOOP_CA", help="PEM file of the server certificate's issuer. Default: the system's."),
]
Cert = Annotated[
    Path | None,
    typer.Option(envvar="PREFLOOP_CLIENT_CERT", help="PEM file of your own certificate, if the server requires one."),
]
Key = Annotated[
    Path | None, typer.Option(envvar="PREFLOOP_CLIENT_KEY", help="PEM file of your certificate's private key.")
]
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 50051


def _echo(text: str) -> None:
    """Writes an answer unchanged to a pipe or file, and without control characters to a terminal."""
    from clients.text import printable

    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)


def main() -> None:
    """Runs the command line. Every expected failure prints one sentence to stderr and exits with code 1."""
    from clients.errors import PrefloopError
    from clients.variables import UnknownSettingError, check_variables

    try:
        # Checked before typer reads flags from variables, but not for --help, which needs none.
        if "--help" not in sys.argv:
            check_variables(os.environ)
        app()
    except (PrefloopError, UnknownSettingError) as error:
        from clients.text import printable

        sys.exit(f"chat: {printable(str(error))}")


@app.callback(invoke_without_command=True)
def talk(
    context: typer.Context,
    host: Host = DEFAULT_HOST,
    port: Port = DEFAULT_PORT,
    user: User = "",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue your newest conversation.")] = False,
    conversation: Annotated[str, typer.Option(help="Continue the conversation with this id.")] = "",
) -> None:
    """Chat with the policy that is being served. Type /help in the chat for its commands.

    An API key is read from the variable PREFLOOP_API_KEY."""
    context.obj = {"host": host, "port": port, "user": user, "ca": ca, "cert": cert, "key": key}
    if context.invoked_subcommand:
        return
    if resume and conversation:
        raise typer.BadParameter("pass only one of --resume and --conversation", param_hint="--resume")
    with connect(**context.obj) as client:
        chat_on(client, conversation or (newest(client) if resume else ""))


@app.command()
def send(
    context: typer.Context,
    message: Annotated[str, typer.Argument(help="The message; - reads it from standard input.")],
    host: Annotated[str | None, typer.Option(help="As above.")] = None,
    port: Annotated[int | None, typer.Option(help="As above.", min=1, max=65535)] = None,
    user: Annotated[str | None, typer.Option(help="As above.")] = None,
    ca: Annotated[Path | None, typer.Option(help="As above.")] = None,
    cert: Annotated[Path | None, typer.Option(help="As above.")] = None,
    key: Annotated[Path | None, typer.Option(help="As above.")] = None,
    conversation: Annotated[str, typer.Option(help="Continue the conversation with this id.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 to 2; 0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Makes an answer of one policy version repeatable.", min=0)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the answer has ended.")] = False,
) -> None:
    """Send one message and print the answer as it comes."""
    inner: dict[str, Any] = {"host": host, "port": port, "user": user, "ca": ca, "cert": cert, "key": key}
    text = sys.stdin.read() if message == "-" else message
    with connect(**{name: inner[name] or value for name, value in context.obj.items()}) as client:
        answer = stream_answer(
            client, text, conversation, temperature, max_tokens, seed, echo=None if as_json else _echo
        )
    if as_json:
        # On a terminal all non-ASCII is escaped, since it would obey an answer's control characters.
        print(json.dumps(answer, ensure_ascii=sys.stdout.isatty()))


@app.command("import-feedback")
def import_feedback(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Open WebUI's export of all feedback, as JSON.")],
    end_users: Annotated[
        bool, typer.Option("--end-users", help="Each rating is by its own user, as an end user of this application.")
    ] = False,
) -> None:
    """Turn ratings that people gave in Open WebUI into votes. An export may be imported again."""
    from clients.import_feedback import ExportError, import_ratings, read_export

    name = context.obj["user"] or getpass.getuser()
    with connect(**context.obj) as client:
        try:
            print(
                import_ratings(
                    lambda user: client.acting_as(os.environ.get(API_KEY), name, user) if end_users else client,
                    read_export(file),
                )
            )
        except (ExportError, OSError) as error:
            sys.exit(f"chat: {error}")


WebHost = Annotated[str, typer.Option(envvar="PREFLOOP_WEB_HOST", help="The address to listen on for HTTP.")]
WebPort = Annotated[
    int, typer.Option(envvar="PREFLOOP_WEB_PORT", help="The port for HTTP; 0 picks a free one.", min=0, max=65535)
]
WebName = Annotated[
    list[str] | None,
    typer.Option(
        envvar="PREFLOOP_WEB_NAME",
        help="A host name under which others reach it; may be repeated (in the variable: separated by spaces).",
    ),
]
WebCert = Annotated[Path | None, typer.Option(envvar="PREFLOOP_WEB_CERT", help="PEM file of its TLS certificate.")]
WebKey = Annotated[
    Path | None, typer.Option(envvar="PREFLOOP_WEB_KEY", help="PEM file of that certificate's private key.")
]
WebServer = Annotated[
    str,
    typer.Option(
        envvar="PREFLOOP_WEB_SERVER",
        help="The server's name in its certificate, if --host is only the address it listens on.",
    ),
]
WebOrigin = Annotated[
    list[str] | None,
    typer.Option(
        envvar="PREFLOOP_WEB_ORIGIN",
        help="A site whose scripts may call the gateway, as https://app.example.org; may be repeated.",
    ),
]
DEFAULT_WEB_HOST, DEFAULT_WEB_PORT = "127.0.0.1", 8080


@app.command()
def web(
    context: typer.Context,
    web_host: WebHost = DEFAULT_WEB_HOST,
    web_port: WebPort = DEFAULT_WEB_PORT,
    web_name: WebName = None,
    web_cert: WebCert = None,
    web_key: WebKey = None,
    web_server: WebServer = "",
    web_origin: WebOrigin = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Also start a server, and a learner that runs rounds on request.")
    ] = False,
) -> None:
    """Serve a page to chat and vote on, with a board for operators, and the gateway beside it.

    If others can reach it, directly or through a proxy, they need keys."""
    names, origins = tuple(web_name or ()), tuple(web_origin or ())
    listening = (web_host, web_port, names, web_cert, web_key, origins)
    _serve_http(context.obj, listening, web_server, serve=serve)


@app.command()
def gateway(
    context: typer.Context,
    web_host: WebHost = DEFAULT_WEB_HOST,
    web_port: WebPort = DEFAULT_WEB_PORT,
    web_name: WebName = None,
    web_cert: WebCert = None,
    web_key: WebKey = None,
    web_server: WebServer = "",
    web_origin: WebOrigin = None,
) -> None:
    """Serve OpenAI's HTTP API for clients that speak it, without the page.

    If others can reach it, directly or through a proxy, they need keys."""
    names, origins = tuple(web_name or ()), tuple(web_origin or ())
    listening = (web_host, web_port, names, web_cert, web_key, origins)
    _serve_http(context.obj, listening, web_server, gateway_alone=True)


def _serve_http(
    outer: dict[str, Any],
    listening: tuple[str, int, tuple[str, ...], Path | None, Path | None, tuple[str, ...]],
    server: str,
    *,
    serve: bool = False,
    gateway_alone: bool = False,
) -> None:
    try:
        from clients.http.command import Page, run
    except ModuleNotFoundError as error:
        sys.exit(f"chat: This needs {error.name}; install it with `pip install 'prefloop[web]'`.")
    page = Page(*listening)
    tls = read_tls(outer["ca"], outer["cert"], outer["key"])
    address = address_of(server or outer["host"], outer["port"])
    # Strangers need keys, and in a container getuser() may fail.
    name = "" if page.strangers else outer["user"] or getpass.getuser()
    run(page, address, name, tls, serve=serve, gateway_alone=gateway_alone)


def connect(
    host: str, port: int, user: str, ca: Path | None = None, cert: Path | None = None, key: Path | None = None
) -> "Client":
    """A client whose server has answered a health check; raises UnavailableError otherwise."""
    from clients.client import Client

    tls = read_tls(ca, cert, key)
    try:
        client = Client(
            address_of(host, port),
            api_key=os.environ.get(API_KEY),
            user=user or getpass.getuser(),
            tls=tls,
            on_wait=say_wait,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--user, {API_KEY}") from error
    try:
        client.check()
    except BaseException:
        client.close()
        raise
    return client


def say_wait(error: "PrefloopError", seconds: float) -> None:
    """Tells the user why nothing happens."""
    print(f"{error} Retrying for up to {seconds:.0f} s; Ctrl-C stops.", file=sys.stderr)


def address_of(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_tls(ca: Path | None, cert: Path | None, key: Path | None) -> "Tls | None":
    """The contents of the files; None without `ca` and `cert`."""
    from clients.channel import Tls

    if (cert is None) != (key is None):
        raise typer.BadParameter("--cert and --key must be given together", param_hint="--cert")
    try:
        given = Tls(*(path.read_bytes() if path else None for path in (ca, cert, key)))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--ca, --cert, --key") from error
    return given if ca or cert else None


def newest(client: "Client") -> str:
    """The id of the newest conversation; empty if there is none."""
    return next((conversation.conversation_id for conversation in client.conversations()), "")


def chat_on(client: "Client", conversation_id: str) -> None:
    """Runs a session in an existing or new conversation: line editing on a terminal, plain lines from a pipe."""
    from rich.console import Console

    from clients.terminal.session import Terminal

    conversation = client.conversation(conversation_id) if conversation_id else None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        Terminal(client, Console(), lambda prompt: input()).run(conversation)
        return
    from clients.terminal.line_editor import LineEditor

    editor = LineEditor()
    terminal = Terminal(client, Console(), editor.read, editor.edit)
    editor.complete({word: command.help for word, command in terminal.commands.items()})
    terminal.run(conversation)


def stream_answer(
    client: "Client",
    message: str,
    conversation_id: str,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
    echo: Callable[[str], object] | None,
) -> dict[str, object]:
    """Sends one message and passes the answer to `echo` as it arrives. Returns the answer with its ids for --json."""
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


if __name__ == "__main__":
    main()

"""The table that `learner users` prints."""

from datetime import datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from learner.ops.users import KINDS, UserFigures
from server.shared.printable import printable

# After this many rows, users without a suspicion are only counted.
ROWS = 40


def print_users(users: list[UserFigures], console: Console) -> None:
    """A table, suspicious users first, and how many it leaves out."""
    if not users:
        console.print("Nobody has voted yet.")
        return
    shown = [user for row, user in enumerate(users) if row < ROWS or user.suspicions or user.quarantined]
    table = Table(title=f"{len(users)} users, {sum(bool(user.suspicions) for user in users)} suspicious")
    for name in ("user", "votes"):
        table.add_column(name, overflow="fold")
    for name in ("per minute", "A", "predicted", "weight"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why")
    for user in shown:
        table.add_row(
            escape(user.user),
            ", ".join(f"{user.votes[kind]} {kind}" for kind in KINDS if user.votes[kind]),
            str(user.fastest_minute),
            _share(user.share_of_a),
            _share(user.agreement),
            f"{user.weight_share:.1%}",
            escape(printable(why(user))),
        )
    console.print(table, highlight=False)
    if len(shown) < len(users):
        console.print(f"{len(users) - len(shown)} more; use --json to list them.", highlight=False)


def why(user: UserFigures) -> str:
    """The evidence against a user: failed tests, and the quarantine with its reason."""
    sentences = list(user.suspicions)
    if word := user.quarantined:
        since = f"{datetime.fromtimestamp(word.create_time).astimezone():%Y-%m-%d %H:%M}"
        sentences.append(f"in quarantine since {since}{f': {word.reason}' if word.reason else ''}")
    return "; ".join(sentences)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

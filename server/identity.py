"""Who calls. On loopback without keys, the metadata `x-user-id` names the user, who is also operator."""

from typing import Any

from server.errors import InvalidArgumentError

DEFAULT_USER = "local"
MAX_USER_CHARS = 128
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def user_of(context: Any) -> str:
    """The caller's name. Raises InvalidArgumentError for one that cannot be a name."""
    metadata = dict(context.invocation_metadata() or ())
    user = str(metadata.get("x-user-id", DEFAULT_USER))
    if not user.strip() or len(user) > MAX_USER_CHARS or not user.isprintable():
        raise InvalidArgumentError("x-user-id", f"x-user-id must be 1 to {MAX_USER_CHARS} printable characters.")
    return user

"""The status of a failed call, the site that a request comes from, and its length."""

import grpc
from starlette.datastructures import Headers
from starlette.types import Message, Receive

STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


def from_this_site(headers: Headers) -> bool:
    """Whether a request comes from our own page, or from no page at all. Browsers send headers that tell; other
    programs have no cookie that another site could misuse."""
    if site := headers.get("sec-fetch-site"):
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == headers.get("host")


def bounded(receive: Receive, most_bytes: int, refusal: Exception) -> Receive:
    """`receive`, which raises `refusal` once a body has more than `most_bytes`."""
    left = most_bytes

    async def receive_some() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise refusal
        return message

    return receive_some

"""What a repeated request is recognised by, besides its request_id."""

import hashlib

from google.protobuf.message import Message


def body_sha256(request: Message) -> bytes:
    """The same for the same request, whoever serialised it."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()

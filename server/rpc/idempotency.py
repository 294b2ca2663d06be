"""The hash that identifies a repeated request, in addition to its request_id."""

import hashlib

from google.protobuf.message import Message


def body_sha256(request: Message) -> bytes:
    """Hash of a request, independent of which client serialised it."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()

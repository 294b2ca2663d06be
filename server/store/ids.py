"""Opaque ids, which sort about as they were made."""

import secrets
import time


def new_id(prefix: str) -> str:
    """`prefix`, the time in milliseconds and 48 random bits, in hexadecimal.

    As in version 7 of UUIDs (RFC 9562): what is made together lies together in an index, so that a commit of many
    writes changes few of its pages."""
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}"

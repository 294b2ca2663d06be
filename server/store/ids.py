"""Opaque ids without a meaningful order."""

import secrets


def new_id(prefix: str) -> str:
    """`prefix` and 96 random bits in hexadecimal."""
    return f"{prefix}_{secrets.token_hex(12)}"

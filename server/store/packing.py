"""Numbers as stored in the database: 32 bits each, little-endian."""

from array import array


def pack_ints(values: list[int]) -> bytes:
    """32-bit little-endian unsigned integers."""
    return array("I", values).tobytes()


def unpack_ints(data: bytes) -> list[int]:
    return array("I", data).tolist()


def pack_floats(values: list[float]) -> bytes:
    """32-bit little-endian floats."""
    return array("f", values).tobytes()


def unpack_floats(data: bytes) -> list[float]:
    return array("f", data).tolist()

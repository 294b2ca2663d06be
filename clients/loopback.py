# Copied from server/shared/loopback.py by `make docs`: write there, not here.
"""Whether a host is this machine alone."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an IP address without brackets, is this machine's loopback. No name is looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

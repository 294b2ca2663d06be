"""How many files, connections among them, a process may have open."""

import resource


def allow_open_files(most: int) -> int:
    """Raises this process's limit to `most` files, or as far as its hard limit goes; how many it is now, of `most`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = min(limit for limit in (most, hard) if limit != resource.RLIM_INFINITY)
    if soft != resource.RLIM_INFINITY and soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    return possible

"""The limit on a process's open files, which include connections."""

import resource


def allow_open_files(most: int) -> int:
    """Raise this process's limit to `most` files, or to its hard limit; return how many of `most` it may open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = min(limit for limit in (most, hard) if limit != resource.RLIM_INFINITY)
    if soft != resource.RLIM_INFINITY and soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    return possible

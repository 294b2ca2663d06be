"""`PREFLOOP_*` variables by setting. One that no program reads is an error, which suggests the nearest name.

Server, learner and clients share one environment, so each knows the names of all. Case is ignored.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from server.shared.setting_names import OLD, SETTINGS, VARIABLES

PREFIX, NESTED = "PREFLOOP_", "__"
# Variables that Kubernetes sets in a pod for a Service named prefloop or prefloop-*. It also sets PREFLOOP_PORT or
# PREFLOOP_*_PORT to an address; as a number, these may be ports of ours.
SERVICE = re.compile(
    r"PREFLOOP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)", re.ASCII
)
ADDRESS = re.compile("(tcp|udp|sctp)://")


class UnknownSettingError(ValueError):
    """A setting that no program reads. The message is one sentence for the operator."""


def check_variables(environ: Mapping[str, str]) -> None:
    """Raise UnknownSettingError if a variable is unknown."""
    refuse(unknown(read_variables(environ)))


def read_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Values by setting, as `ppo.steps` for PREFLOOP_PPO__STEPS. Raises UnknownSettingError for those of Kubernetes."""
    ours = {name.upper(): text for name, text in environ.items() if name.upper().startswith(PREFIX)}
    services = [
        name
        for name, text in ours.items()
        if SERVICE.fullmatch(name) or (name.endswith("_PORT") and ADDRESS.match(text))
    ]
    if services:
        more = f" and {len(services) - 1} more" if services[1:] else ""
        raise UnknownSettingError(
            f"Kubernetes sets {min(services)}{more} for a Service whose name begins with prefloop: put "
            "`enableServiceLinks: false` into the pod's spec."
        )
    return {name[len(PREFIX) :].lower().replace(NESTED, "."): text for name, text in ours.items()}


def unknown(variables: Iterable[str]) -> Iterator[str]:
    """Yield each unknown setting, as a variable, with a hint."""
    for name in sorted(set(variables) - SETTINGS - VARIABLES - OLD):
        near = nearest(name, SETTINGS | VARIABLES)
        yield hint(as_variable(name), near and as_variable(near))


def refuse(found: Iterable[str]) -> None:
    """Raise UnknownSettingError if anything was found."""
    if names := list(found):
        raise UnknownSettingError(f"Unknown setting{'s' * (len(names) > 1)}: {', '.join(names)}.")


def hint(name: str, near: str | None) -> str:
    return f"{name} (did you mean {near}?)" if near else name


def nearest(name: str, known: Collection[str]) -> str | None:
    """The setting that was probably meant: of the same name in another table, or with a similar spelling."""
    from difflib import get_close_matches

    last = name.rpartition(".")[2]
    elsewhere = sorted(other for other in known if other.rpartition(".")[2] == last)
    return next(iter(elsewhere or get_close_matches(name, sorted(known), 1)), None)


def as_variable(name: str) -> str:
    """PREFLOOP_PPO__STEPS for `ppo.steps`."""
    return PREFIX + name.replace(".", NESTED).upper()

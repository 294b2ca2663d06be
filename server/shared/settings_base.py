"""Sources of settings: flags override `PREFLOOP_*` variables, which override prefloop.toml, then defaults.

Variables, and the file in the working directory, are shared by server, learner and clients. Each program reads its own
settings, ignores those of the others, and refuses unknown names. A setting is accepted under its old name for one
version, with a line on standard error; if its new name is set anywhere, the old one is ignored.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from tomllib import TOMLDecodeError
from typing import Any, ClassVar, Self

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from server.shared.setting_names import OLD, SETTINGS, VARIABLES
from server.shared.tables import flatten, nest
from server.shared.variables import NESTED, PREFIX, as_variable, hint, nearest, read_variables, refuse, unknown

CONFIG_FILE = "prefloop.toml"


class SettingsBase(BaseSettings):
    """Settings, validated once at start. Errors are ValueError or OSError, which `explain` turns into a sentence."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter=NESTED, extra="forbid", frozen=True)

    # Old name to new name, as `ppo.dtype`. An entry stays for one version.
    renamed: ClassVar[Mapping[str, str]] = {}
    # The factor for a number under an old name, if the new name has another unit.
    rescaled: ClassVar[Mapping[str, int]] = {}
    # Settings that are gone, and what decides instead. An entry stays for one version.
    dropped: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def load(cls, **flags: Any) -> Self:
        """Load the settings; flags that are None are ignored."""
        return cls(**{name: value for name, value in flags.items() if value is not None})

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Settings from these values and the defaults, without variables and prefloop.toml."""
        return cls(_build_sources=((InitSettingsSource(cls, values),), values))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        variables = read_variables(os.environ)
        file = flatten(_lower(TomlConfigSettingsSource(cls, CONFIG_FILE).toml_data))
        refuse([*unknown(variables), *_unknown_keys(file)])
        cls._say_renamed(flatten(init_settings.init_kwargs), variables, file)
        return (
            init_settings,
            _variables_source(cls, cls._own(variables)),
            InitSettingsSource(cls, nest(cls._own(file))),
            _variables_source(cls, cls._renamed(variables)),
            InitSettingsSource(cls, nest(cls._renamed(file))),
        )

    @classmethod
    def _own(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """This program's settings."""
        tops = cls.model_fields.keys()
        old = cls.renamed.keys() | cls.dropped.keys()
        return {n: value for n, value in values.items() if n.partition(".")[0] in tops and n not in old}

    @classmethod
    def _renamed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of settings under old names, by new name."""
        return {new: cls._rescale(old, values[old]) for old, new in cls.renamed.items() if old in values}

    @classmethod
    def _rescale(cls, old: str, value: Any) -> Any:
        if old not in cls.rescaled:
            return value
        if not str(value).isdecimal() or not int(value):
            raise ValueError(f"The setting {old} is not valid: {value!r} is not a whole number above zero.")
        return str(int(value) * cls.rescaled[old])

    @classmethod
    def _say_renamed(cls, flags: Iterable[str], variables: Iterable[str], file: Iterable[str]) -> None:
        """Print a line for each setting under its old name, and for each that is gone."""
        given = {*flags, *variables, *file}
        for names, where, spell in ((variables, "", as_variable), (file, f"{CONFIG_FILE}: ", _as_key)):
            for old in sorted(cls.renamed.keys() & set(names)):
                new = cls.renamed[old]
                if new in given:
                    _say(f"{where}{spell(old)} is ignored: its new name, {new}, is set too.")
                else:
                    until = "the old name works in this version, not in the next"
                    _say(f"{where}{spell(old)} is now {spell(new)}; {until}.")
            for gone in sorted(cls.dropped.keys() & set(names)):
                _say(f"{where}{spell(gone)} is ignored: {cls.dropped[gone]}.")


def explain(error: Exception) -> str:
    """What is wrong with the settings, as a sentence."""
    match error:
        case ValidationError():
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                return f"Unknown setting: {hint(where, nearest(where, SETTINGS))}."
            return f"{f'The setting {where} is' if where else 'The settings are'} not valid: {first['msg']}."
        case TOMLDecodeError():
            return f"{CONFIG_FILE} is not TOML: {error}."
        case UnicodeDecodeError():
            return f"{CONFIG_FILE} is not UTF-8."
        case OSError():
            return f"{CONFIG_FILE} cannot be read ({error.strerror})."
        case SettingsError():
            return f"The settings are not valid: {error}."
    return str(error)


def _unknown_keys(file: Iterable[str]) -> Iterator[str]:
    """Each unknown key of the file, with a hint. Some settings can only be set as variables."""
    for name in sorted(set(file) - SETTINGS - OLD):
        near = nearest(name, SETTINGS)
        meant = f"the variable {as_variable(name)}" if name in VARIABLES else near and _as_key(near)
        yield hint(f"{CONFIG_FILE}: {_as_key(name)}", meant)


def _as_key(name: str) -> str:
    """`[ppo] steps` for `ppo.steps`."""
    table, _, key = name.rpartition(".")
    return f"[{table}] {key}" if table else key


def _lower(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name.lower(): _lower(value) if isinstance(value, dict) else value for name, value in table.items()}


def _variables_source(cls: type[BaseSettings], variables: Mapping[str, str]) -> EnvSettingsSource:
    """A source that only reads these variables, given by setting name."""
    source = EnvSettingsSource(cls)
    source.env_vars = {as_variable(name).lower(): text for name, text in variables.items()}
    return source


@cache
def _say(line: str) -> None:
    """Print a line once per process, which may load its settings several times."""
    print(line, file=sys.stderr)

"""`learner import`: preferences of other people, from a file, into the store and out of it again."""

from contextlib import closing
from pathlib import Path

from learner.ops.preference_files import PreferenceFileError, read_preferences
from learner.settings import LearnerSettings
from server.shared.errors import InvalidArgumentError
from server.store.store import Store


def import_preferences(settings: LearnerSettings, path: Path, name: str) -> str:
    """Stores a file's preferences as one import, whole or not at all; returns a sentence about it."""
    name = name or path.stem
    try:
        with closing(Store.open(settings.data_dir)) as store:
            count = store.imports.add(name, path.name, read_preferences(path))
    except (PreferenceFileError, OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError("file", f"{error} Nothing was imported.") from error
    return f"{count} preferences were imported as {name!r}. The next round reads at most {settings.reward.imported}."


def remove_import(settings: LearnerSettings, name: str) -> str:
    """Deletes an import; returns a sentence about it."""
    with closing(Store.open(settings.data_dir)) as store:
        count = store.imports.remove(name)
    return f"{name!r} was removed with its {count} preferences. What was trained on them stays."


def list_imports(settings: LearnerSettings) -> str:
    """A line for each import."""
    with closing(Store.open(settings.data_dir)) as store:
        found = store.imports.all()
    return "\n".join(f"{one.name}  {one.preferences} preferences from {one.source}" for one in found) or "no imports"

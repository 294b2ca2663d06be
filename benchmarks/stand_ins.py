"""Imported before the learner's modules, on a machine that has torch, transformers and peft but not the rest.

What those modules name at import and a calculation never calls, settings and the feature cache, is an empty stand-in
where the package that it needs is not installed.
"""

import importlib.util
import sys
from unittest.mock import MagicMock

NEEDED_BY = {"pydantic_settings": ["learner.settings"], "sqlite_utils": ["sqlite_utils", "sqlite_utils.utils"]}

for package, modules in NEEDED_BY.items():
    if importlib.util.find_spec(package) is None:
        sys.modules.update({name: MagicMock() for name in modules})

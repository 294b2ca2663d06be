"""Import this before the learner's modules on a machine that has only torch, transformers and peft.

Modules that the learner imports but a calculation never calls (settings, the feature cache) are replaced by mocks if
the packages they need are not installed.
"""

import importlib.util
import sys
from unittest.mock import MagicMock

NEEDED_BY = {"pydantic_settings": ["learner.settings"], "sqlite_utils": ["sqlite_utils", "sqlite_utils.utils"]}

for package, modules in NEEDED_BY.items():
    if importlib.util.find_spec(package) is None:
        sys.modules.update({name: MagicMock() for name in modules})

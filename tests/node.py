"""The JavaScript example, installed as its README says."""

import shutil
import subprocess
from pathlib import Path

import pytest

INSTALL_SECONDS = 120
# npm's error codes if no registry answers or grants access. Not E404, which would be our mistake.
UNREACHABLE = ("ENOTFOUND", "EAI_AGAIN", "ECONN", "ETIMEDOUT", "ERR_SOCKET", "E401", "E403", "E429", "E50")


def install(root: Path, directory: Path) -> Path:
    """Copies `clients/node` and the protos, laid out as in the repository, and installs the packages; returns the
    folder."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    made = directory / "clients" / "node"
    shutil.copytree(root / "clients" / "node", made, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(root / "proto", directory / "proto", ignore=shutil.ignore_patterns("*.py*", "__pycache__"))
    npm = ["npm", "ci", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=20000"]
    done = subprocess.run(npm, cwd=made, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    if done.returncode and any(f"code {sign}" in done.stderr for sign in UNREACHABLE):
        pytest.skip("npm cannot fetch the example's packages here")
    assert done.returncode == 0, done.stderr
    return made

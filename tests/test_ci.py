"""`need` in .ci/run, with commands that only print their arguments."""

import os
import subprocess
from pathlib import Path

import pytest

# Installing creates the package's command.
APT_GET = """#!/bin/sh
echo "apt-get $*"
if [ "$1" = install ]; then printf '#!/bin/sh' > "$HERE/owl"; chmod +x "$HERE/owl"; fi
"""


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """Fake commands of a root user with apt-get."""
    fake(tmp_path / "id", "#!/bin/sh\necho 0\n")
    fake(tmp_path / "apt-get", APT_GET)
    return tmp_path


def fake(command: Path, text: str) -> None:
    command.write_text(text, encoding="utf-8")
    command.chmod(0o755)


def need(root: Path, fakes: Path, command: str) -> tuple[int, str, str]:
    function = "need() {" + (root / ".ci" / "run").read_text().partition("need() {")[2].partition("\n}\n")[0] + "\n}\n"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{function}{command}; echo went on"],
        capture_output=True, text=True, timeout=20, check=False,
        env={"HERE": str(fakes), "PATH": f"{fakes}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_what_is_missing_is_installed_once(root: Path, fakes: Path) -> None:
    installed = "apt-get update -qq\napt-get install -qq --yes --no-install-recommends owl-bin owl-data\n"
    assert need(root, fakes, "need owl owl-bin owl-data") == (0, f"{installed}went on\n", "")
    assert need(root, fakes, "need owl owl-bin owl-data") == (0, "went on\n", "")


@pytest.mark.parametrize(
    ("command", "text"), [("id", "echo 1000"), ("apt-get", "exit 1"), ("apt-get", "test $1 = update")]
)
def test_where_nothing_can_be_installed_the_rest_goes_on(root: Path, fakes: Path, command: str, text: str) -> None:
    fake(fakes / command, f"#!/bin/sh\n{text}\n")
    assert need(root, fakes, "need owl owl-bin") == (0, "went on\n", "owl is missing: tests that need it are skipped\n")

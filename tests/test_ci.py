"""`need` in .ci/run, with commands that only say how they were called."""

import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A root user's apt-get, which makes the package's command."""
    (tmp_path / "id").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "apt-get").write_text(
        '#!/bin/sh\necho "apt-get $*"\n[ "$1" = update ] || { printf "#!/bin/sh\\n" > "$HERE/owl"; chmod +x "$HERE/owl"; }\n'
    )
    for fake in tmp_path.iterdir():
        fake.chmod(0o755)
    return tmp_path


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


@pytest.mark.parametrize("broken", ["id", "apt-get"])
def test_without_it_the_rest_goes_on(root: Path, fakes: Path, broken: str) -> None:
    # Somebody else than root; an apt-get that fails.
    (fakes / broken).write_text("#!/bin/sh\necho 1000\nexit 1\n" if broken == "apt-get" else "#!/bin/sh\necho 1000\n")
    code, out, err = need(root, fakes, "need owl owl-bin")
    assert (code, out.splitlines()[-1]) == (0, "went on")
    assert err == "owl is missing: tests that need it are skipped\n"
    assert "install" not in out

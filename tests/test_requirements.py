"""The pinned packages can be installed with every Python, on a machine that reaches only a package index.

A torch without CUDA libraries, from another place, leaves open what the index's own torch pins; so pins that were made
beside one need not fit the other."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import slow

ROOT = Path(__file__).parents[1]
CASES = list(itertools.product(["cpu", "gpu"], ["3.11", "3.12", "3.13", "3.14"], ["x86_64", "aarch64"]))


@pytest.mark.parametrize(
    ("extra", "python", "processor"),
    [case if case == ("cpu", "3.14", "x86_64") else slow(*case) for case in CASES],
)
def test_pins_of_every_python_and_processor_agree(extra: str, python: str, processor: str, tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("uv"), "pip", "compile", "pyproject.toml", "--quiet", "--extra", extra,
        "--group", "dev", "--constraint", f"requirements/{extra}.txt", "--python-version", python,
        "--python-platform", f"{processor}-manylinux_2_39", "--no-header", "--no-annotate",
        "--output-file", tmp_path / "found.txt",
    ]  # fmt: skip
    environment = {**os.environ, "UV_FIND_LINKS": ""}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("the package index does not answer")
    if any(words in done.stderr for words in ("Failed to fetch", "Request failed", "network was disabled")):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    found = dict(line.split("==") for line in (tmp_path / "found.txt").read_text().splitlines())
    assert (found["torch"], found["grpcio-tools"]) == ("2.13.0", "1.85.1")


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_every_line_is_a_pin_without_an_address(extra: str) -> None:
    for line in (ROOT / "requirements" / f"{extra}.txt").read_text(encoding="utf-8").splitlines():
        requirement, _, marker = line.partition(" ; ")
        name, version = requirement.split("==")
        assert "+" not in version, line
        assert "/" not in name + marker, line

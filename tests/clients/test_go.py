"""The Go example, which these tests do not compile: every name it uses from the protos is checked against their
descriptors, and `buf` runs its template with plugins that only record their request."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor
from prefloop.v1 import chat_pb2, feedback_pb2

PACKAGE = "example.com/chat/gen/prefloop/v1"
FILES: list[FileDescriptor] = [chat_pb2.DESCRIPTOR, feedback_pb2.DESCRIPTOR]
MESSAGES = {name: message for file in FILES for name, message in file.message_types_by_name.items()}
SERVICES = {name: service for file in FILES for name, service in file.services_by_name.items()}
# Responds with one file that lists the request.
PLUGIN = """#!{python}
import sys
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse

asked = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
lines = [asked.parameter] + [f"{{file.name}} {{file.options.go_package}}" for file in asked.proto_file]
response = CodeGeneratorResponse(supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL)
response.file.add(name=sys.argv[0].rpartition("/")[2], content="\\n".join(lines))
sys.stdout.buffer.write(response.SerializeToString())
"""


@pytest.fixture
def code(root: Path) -> str:
    return (root / "clients" / "go" / "main.go").read_text()


def camel(name: str) -> str:
    """protoc-gen-go's name of a field, for lower-case names with single underscores, which buf's lint requires."""
    return "".join(part.capitalize() for part in name.split("_"))


def wrapper(field: FieldDescriptor) -> str:
    return f"{field.containing_type.name}_{camel(field.name)}"


def test_its_types_and_constants_are_what_the_plugins_make(code: str) -> None:
    made = set(MESSAGES)
    made |= {wrapper(field) for message in MESSAGES.values() for field in message.fields if field.containing_oneof}
    for file in FILES:
        for enum in file.enum_types_by_name.values():
            made |= {enum.name} | {f"{enum.name}_{value.name}" for value in enum.values}
    for service in SERVICES:
        made |= {f"{service}Client", f"New{service}Client"}
    used = set(re.findall(r"\bprefloopv1\.(\w+)", code))
    assert used - made == set()
    assert {"NewChatServiceClient", "ChatResponse_Delta", "Thumb_THUMB_UP", "SubmitThumbRequest"} <= used


def test_its_methods_and_fields_are_there(code: str) -> None:
    for variable, service in re.findall(r"\b(\w+) prefloopv1\.(\w+)Client\b", code):
        called = set(re.findall(rf"\b{variable}\.(\w+)\(ctx", code))
        assert called
        assert called <= set(SERVICES[service].methods_by_name)
    literals = re.findall(r"&prefloopv1\.(\w+)\{(.*?)\}", code)
    assert [name for name, _ in literals] == ["ChatRequest", "SubmitThumbRequest"]
    for name, fields in literals:
        assert set(re.findall(r"(\w+):", fields)) <= {camel(field.name) for field in MESSAGES[name].fields}
    read = dict(re.findall(r"event\.(\w+)\.Get(\w+)\(\)", code))
    assert read == {"Started": "ResponseId", "Delta": "Text"}
    events = {
        camel(field.name): field.message_type for field in MESSAGES["ChatResponse"].oneofs_by_name["event"].fields
    }
    assert all(field in map(camel, events[event].fields_by_name) for event, field in read.items())


def test_bufs_template_gives_the_protos_the_package_that_it_imports(root: Path, tmp_path: Path, code: str) -> None:
    for name in ("protoc-gen-go", "protoc-gen-go-grpc"):
        (tmp_path / name).write_text(PLUGIN.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    subprocess.run(
        [Path(sys.executable).parent / "buf", "generate", "--template", "clients/go/buf.gen.yaml", "-o", tmp_path],
        cwd=root, check=True, timeout=60, env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    for name in ("protoc-gen-go", "protoc-gen-go-grpc"):
        parameter, *files = (tmp_path / "clients" / "go" / "gen" / name).read_text().splitlines()
        assert parameter == "paths=source_relative"
        packages = dict(line.split(" ") for line in files)
        assert packages["prefloop/v1/chat.proto"] == f"{PACKAGE};prefloopv1"
        assert packages["prefloop/v1/feedback.proto"] == f"{PACKAGE};prefloopv1"
        # Google's own protos keep their packages.
        assert packages["google/protobuf/timestamp.proto"] == "google.golang.org/protobuf/types/known/timestamppb"
    assert f'prefloopv1 "{PACKAGE}"' in code
    assert PACKAGE in (root / "clients" / "go" / "README.md").read_text()

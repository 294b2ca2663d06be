"""Writes docs/languages.md, for those who bring no Python, from the protos' descriptors. `make docs` runs it.

A request shows what it needs and leaves out what it does not: fields with presence, and those that are named here. A
field that is in neither list is an error, so that whoever adds one says which it is.
"""

import json
import sys
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from prefloop.v1 import account_pb2, chat_pb2, feedback_pb2, policy_pb2

PAGE = Path(__file__).with_name("languages.md")
BEGIN, END = "<!-- made by docs/languages.py -->\n", "<!-- until here -->\n"
PACKAGE = chat_pb2.DESCRIPTOR.package
FILES = [module.DESCRIPTOR for module in (chat_pb2, feedback_pb2, account_pb2, policy_pb2)]
SERVICES = {name: service for file in FILES for name, service in file.services_by_name.items()}

EXAMPLES: dict[str, Any] = {
    "message": "Why is the sky blue?",
    "text": "Air scatters blue light most.",
    "conversation_id": "conv_...",
    "response_id": "resp_...",
    "comparison_id": "cmp_...",
    "feedback_id": "fb_...",
    "round_id": "round_...",
    "version": "v0001",
    "messages": [
        {"role": "ROLE_USER", "content": "Why is the sky blue?"},
        {"role": "ROLE_ASSISTANT", "content": "Air scatters blue light most."},
    ],
}
# A name, or one in a certain message: what is empty starts a conversation, means the last version or the caller.
OPTIONAL = {
    "comment", "reason", "request_id", "page_size", "page_token", "user", "days",
    "ChatRequest.conversation_id", "CompareRequest.conversation_id", "RollbackPolicyRequest.version",
}  # fmt: skip
# What people copy; docs/reference.md has the others.
SHOWN = (
    "ChatService/Chat", "ChatService/Compare", "FeedbackService/SubmitChoice", "FeedbackService/SubmitThumb",
    "FeedbackService/SubmitCorrection", "ChatService/ListConversations", "ChatService/GetConversation",
    "PolicyService/GetActivePolicy", "PolicyService/ListRounds", "PolicyService/RollbackPolicy",
)  # fmt: skip

SECTION = """
The protos are the interface. With [grpcurl](https://github.com/fullstorydev/grpcurl), through reflection:

    grpcurl -plaintext localhost:50051 list
    call() {{ grpcurl -plaintext -H 'x-user-id: ana' -d "$2" localhost:50051 "{package}.$1"; }}
{calls}

Where the server wants a key, put `-H "authorization: Bearer $PREFLOOP_API_KEY"` in the place of `x-user-id`; beyond
loopback `-cacert chat.crt` in that of `-plaintext`, or nothing where the system trusts the certificate. The reference
has [a request for every RPC](reference.md#who-may-call-what).

[`clients/node`](../clients/node) is a client in JavaScript, which reads the protos as they are.
[`clients/go`](../clients/go) is one in Go with the code that `buf` makes: an RPC is
`{go}.{client}(connection).{method}`, an event `*{go}.{event}`, a choice `{go}.{choice}`.

"""


def section() -> str:
    """What stands between the two marks."""
    chat, delta = SERVICES["ChatService"], chat_pb2.ChatResponse.DESCRIPTOR.fields_by_name["delta"]
    choice = feedback_pb2.DESCRIPTOR.enum_types_by_name["Choice"]
    return SECTION.format(
        package=PACKAGE,
        calls="\n".join(f"    call {name} '{body(name)}'" for name in SHOWN),
        go=PACKAGE.replace(".", ""),
        client=f"New{chat.name}Client",
        method=chat.methods_by_name["Chat"].name,
        event=f"{delta.containing_type.name}_{delta.name.title()}",
        choice=f"{choice.name}_{said(choice)}",
    )


def body(name: str) -> str:
    """A request of "Service/Method" as JSON. Raises KeyError for a field that is needed and has no example."""
    service, _, method = name.partition("/")
    request = SERVICES[service].methods_by_name[method].input_type
    needed = [field for field in request.fields if not optional(field)]
    values = {field.name: said(field.enum_type) if field.enum_type else EXAMPLES[field.name] for field in needed}
    return json.dumps(values)


def optional(field: FieldDescriptor) -> bool:
    named = {field.name, f"{field.containing_type.name}.{field.name}"} & OPTIONAL
    return field.has_presence or bool(named)


def said(enum: EnumDescriptor) -> str:
    """The first value that says something: 0 is "unspecified"."""
    return str(enum.values_by_number[1].name)


def written(readme: str) -> str:
    """The page with the section made anew."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + section() + END + after


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(written(PAGE.read_text()))

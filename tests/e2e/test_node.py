"""The JavaScript example on the real engine."""

import os
import subprocess
from pathlib import Path

import pytest
from prefloop.v1 import chat_pb2, feedback_pb2

from tests.e2e.conftest import LiveServer

pytestmark = pytest.mark.e2e
NODE = (("x-user-id", "node"),)


def test_javascript_chats_and_its_votes_are_kept(live: LiveServer, node_example: Path) -> None:
    environment = {**os.environ, "PREFLOOP_PORT": live.address.rpartition(":")[2], "PREFLOOP_USER": "node"}
    done = subprocess.run(
        ["node", "chat.js", "Name one bird."], cwd=node_example, env=environment, input="y\nb\n",
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    listed = live.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=NODE)
    requests = [chat_pb2.GetConversationRequest(conversation_id=each.conversation_id) for each in listed.conversations]
    compared, answered = (live.chat.GetConversation(each, metadata=NODE).conversation.turns for each in requests)
    said, _, rest = done.stdout.partition("\nGood? y or n: ")
    assert said
    assert said == answered[0].response.text
    for slot, answer in (("SLOT_A", compared[0].comparison.a), ("SLOT_B", compared[0].comparison.b)):
        assert f"\n{slot}: {answer.text}\n" in rest
    assert answered[0].response.feedback[0].thumb == feedback_pb2.THUMB_UP
    assert compared[0].comparison.feedback.choice == feedback_pb2.CHOICE_B

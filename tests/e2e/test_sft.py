"""Ten demonstrations of a style: they change the answers to other questions, in the running server, and back."""

from pathlib import Path

import pytest
from prefloop.v1.feedback_pb2 import ROLE_ASSISTANT, ROLE_USER, Message
from prefloop.v1.policy_pb2 import ROUND_KIND_ALIGNMENT, ROUND_KIND_SFT

from clients import Client
from clients.demo.questions import questions
from clients.demo.voter import ask
from server.settings import DEFAULT_MODEL
from tests.e2e.conftest import live_server
from tests.e2e.small_rounds import TINY, small_round
from tests.e2e.test_canary import until_serving

pytestmark = pytest.mark.e2e

# How the default model is to begin its answers, and the rest of ten of them.
AHOY = "Ahoy! "
SAID = [
    "It comes from the tides and the moon.", "Start small and keep at it.", "Use salt, water and time.",
    "Ask a friend to help you.", "Read the label first.", "Rest, drink water, and wait.", "Write it down and send it.",
    "Light bends in the air.", "Plan one day at a time.", "Take a map and good shoes.",
]  # fmt: skip
ASKED = questions(0)[100:132]
SETTINGS = {"PREFLOOP_GATE__PROMPTS": "12", "PREFLOOP_GATE__ANSWERS": "1"}
# The tiny model has learned nothing before: its characters mean nothing.
TINY_SETTINGS = {"PREFLOOP_SFT__LEARNING_RATE": "1e-2", "PREFLOOP_SFT__BATCH": "2"}


def show(client: Client, model: str) -> None:
    """Demonstrates the style, to other questions than are asked later."""
    for question, rest in zip(questions(0), SAID, strict=False):
        answer = AHOY + rest if model == DEFAULT_MODEL else "zzzzzzzz"
        client.demonstrate([Message(role=ROLE_USER, content=question), Message(role=ROLE_ASSISTANT, content=answer)])


def in_style(client: Client, model: str, version: str) -> int:
    """How many of the 32 questions the version answers in the style."""
    answers = [ask(client, question, max_tokens=8, seed=number) for number, question in enumerate(ASKED)]
    assert {answer.policy_version for answer in answers} == {version}
    if model == DEFAULT_MODEL:
        return sum(answer.text.startswith(AHOY.strip()) for answer in answers)
    return sum(answer.text.count("z") >= 3 for answer in answers)


def test_ten_demonstrations_change_the_answers_to_other_questions(tmp_path: Path, model: str) -> None:
    settings = SETTINGS | ({} if model == DEFAULT_MODEL else TINY_SETTINGS)
    with live_server(tmp_path, model) as live:
        with Client(live.address, user="bob") as client:
            show(client, model)
            assert in_style(client, model, "v0000") == 0
            report = small_round(model).run(tmp_path, "sft", **settings)
            assert (report["state"], report["policy_version"]) == ("promoted", "v0001"), report["sentence"]
            # The server did not have to be restarted.
            assert report["sentence"] == "v0001 is active instead of v0000; 1 running server loaded it."
            assert in_style(client, model, "v0001") >= 6
            assert next(client.rounds()).kind == ROUND_KIND_SFT
            assert client.active_policy().policy.reference_version == "v0001"
            # Back and forth across the reference.
            client.rollback()
            until_serving(client, "v0000")
            assert in_style(client, model, "v0000") == 0
            client.activate("v0001")
            until_serving(client, "v0001")
        assert live.stop() == 0

        live.start()
        with Client(live.address, user="bob") as client:
            until_serving(client, "v0001")
            assert list(client.forget_user().policy_versions) == ["v0001"]


@pytest.mark.slow
def test_a_round_of_votes_starts_from_what_was_demonstrated(tmp_path: Path, tiny_model: Path) -> None:
    model = str(tiny_model)
    with live_server(tmp_path, model) as live, Client(live.address, user="bob") as client:
        show(client, model)
        assert TINY.run(tmp_path, "sft", **SETTINGS, **TINY_SETTINGS)["policy_version"] == "v0001"
        TINY.vote(client)
        report = TINY.run(tmp_path)
        assert (report["state"], report["policy_version"]) == ("promoted", "v0002"), report["sentence"]
        until_serving(client, "v0002")
        assert next(client.rounds()).kind == ROUND_KIND_ALIGNMENT
        assert client.active_policy().policy.reference_version == "v0001"
        assert list(client.forget_user().policy_versions) == ["v0001", "v0002"]

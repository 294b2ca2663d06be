"""Versions side by side on the real engine: pinned answers, a switch without a pause, a comparison, a rollback."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from prefloop.v1 import chat_pb2, feedback_pb2, policy_pb2
from safetensors.torch import load_file, save_file

from learner.improve_settings import PolicySettings
from learner.model.policy import TrainablePolicy
from server.store.files.manifest import new_version
from server.store.store import Store
from tests.e2e.conftest import LiveServer, live_server
from tests.e2e.test_swap import LONG, activate, ask, spans

pytestmark = pytest.mark.e2e


@pytest.fixture
def adapters(model: str, tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path / "data", model, PREFLOOP_SERVE_ADAPTERS="true") as server:
        yield server


def make_adapter(live: LiveServer, seed: int, spoil: bool = False) -> str:
    """Publishes and registers, as a learner would, an adapter that changes the reference's answers."""
    policies = live.data_dir / "policies"
    policy = TrainablePolicy.create(policies / "v0000", PolicySettings(), torch.float32, torch.device("cpu"), seed)
    with closing(Store.open(live.data_dir)) as store:
        version = f"v{len(store.policies.page()):04d}"
        with new_version(policies / version, kind="adapter", reference_version="v0000") as staging:
            policy.save(staging)
            shake(staging / "adapter_model.safetensors", seed, spoil)
        store.policies.register(
            version, kind="adapter", state="candidate", parent_version="v0000", reference_version="v0000",
            round_id=None, reward_model_version=None, metrics={},
        )  # fmt: skip
    return version


def shake(path: Path, seed: int, spoil: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
    if spoil:
        next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def choose_against(live: LiveServer, loser: str, user: str) -> set[str]:
    """Runs one comparison and votes for the answer that is not from `loser`; returns the versions shown."""
    who: Any = (("x-user-id", user),)
    request = chat_pb2.CompareRequest(message="Name a colour.", sampling={"max_tokens": 8})
    comparison_id = next(iter(list(live.chat.Compare(request, timeout=120, metadata=who)))).started.comparison_id
    with closing(Store.open(live.data_dir)) as store:
        shown = store.responses.comparison(user, comparison_id)
    choice = feedback_pb2.CHOICE_B if shown.a.policy_version == loser else feedback_pb2.CHOICE_A
    vote = feedback_pb2.SubmitChoiceRequest(comparison_id=comparison_id, choice=choice)
    live.feedback.SubmitChoice(vote, timeout=10, metadata=who)
    assert [len(answer.spans) for answer in (shown.a, shown.b)] == [1, 1]
    return {shown.a.spans[0].policy_version, shown.b.spans[0].policy_version}


def test_versions_live_side_by_side_and_the_loser_goes(adapters: LiveServer) -> None:
    live = adapters
    asked = {"temperature": 0, "max_tokens": 24}
    before = ask(live, "Name three colours.", **asked)[1]
    version = make_adapter(live, seed=1)

    # Pinned: an answer that began before the switch ends with the version it began with.
    call = live.chat.Chat(chat_pb2.ChatRequest(message=LONG, sampling={"max_tokens": 100}), timeout=120)
    opening = next(call).started
    next(call)
    activate(live, version)
    ending = list(call)[-1].finished
    assert spans(live, opening) == [(0, ending.usage.completion_tokens, "v0000", False)]

    started, after, finished = ask(live, "Name three colours.", **asked)
    assert after != before
    assert spans(live, started) == [(0, finished.usage.completion_tokens, version, False)]

    # A broken version never serves.
    broken = make_adapter(live, seed=2, spoil=True)
    with pytest.raises(grpc.RpcError) as error:
        activate(live, broken)
    assert "not finite" in error.value.details()

    # The failed activation moved the pointer back to `version`, which starts no comparison. Activating it again does,
    # with the version before it.
    activate(live, "v0000")
    activate(live, version)
    # The server notices within a poll; until then, comparisons show one version.
    shown, number = {version}, 0
    while shown == {version} and number < 20:
        shown = choose_against(live, version, f"early{number}")
        number += 1
    assert shown == {"v0000", version}
    for number in range(1, 7):
        choose_against(live, version, f"user{number}")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        active = live.policies.GetActivePolicy(policy_pb2.GetActivePolicyRequest(), timeout=10)
        if active.policy.version == "v0000" and active.replicas[0].loaded_version == "v0000":
            break
    assert active.policy.version == "v0000"
    assert ask(live, "Name three colours.", **asked)[1] == before

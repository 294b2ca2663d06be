"""Scores over real gRPC: the newest reward model is used without a restart, and refusals are sentences."""

import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from prefloop.v1 import scoring_pb2, scoring_pb2_grpc

from learner.model.features import FeatureSpec, extract
from learner.model.forward import to_tokens
from learner.ops.score_server import Scorer, ScoringService
from learner.reward.linear_reward_model import LinearRewardModel
from learner.reward.standardiser import Standardiser
from server.store.files.manifest import new_version
from server.store.store import Store
from tests.learner.conftest import HIDDEN, WORDS
from tests.learner.rounds import make_reference

PROMPT, CANDIDATES = [5, 6, 7], [[8, 9], [10, 11, 12, 2], [13]]
WIDTH = HIDDEN + 1


def reward_model(seed: int) -> LinearRewardModel:
    generator = torch.Generator().manual_seed(seed)
    members = torch.randn(3, WIDTH, generator=generator)
    return LinearRewardModel(
        spec=FeatureSpec(meaning=(2,)),
        standardiser=Standardiser(torch.zeros(WIDTH), torch.ones(WIDTH)), weights=members.mean(dim=0),
        members=members, member_bias=torch.tensor([0.0, 0.5, -0.5]), bias=0.25, low=-3.0, high=3.0, thumb_bar=0.0,
        bad_bar=0.0, eta=0.5, temperature=0.0, l2=1.0, prompt_mean=torch.zeros(WIDTH - 1),
        prompt_scale=torch.zeros(WIDTH - 1),
    )  # fmt: skip


def register(data_dir: Path, version: str, model: LinearRewardModel) -> None:
    final = data_dir / "reward_models" / version
    with new_version(final, kind="full", reference_version="v0000") as staging:
        model.save(staging)
    store = Store.open(data_dir)
    lease: Any = store.leases.acquire("learner", "test", 60)
    store.reward_models.register(version, reference_version="v0000", round_id=None, metrics={}, fence=lease)
    store.leases.release(lease)
    store.close()


@pytest.fixture
def data_dir(tmp_path: Path, model_directory: Path) -> Path:
    make_reference(tmp_path / "data", model_directory)
    return tmp_path / "data"


@asynccontextmanager
async def scoring(data_dir: Path) -> AsyncIterator[Any]:
    service = ScoringService(lambda: Scorer(data_dir, "float32", torch.device("cpu"), 64))
    server = grpc.aio.server()
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield scoring_pb2_grpc.ScoringServiceStub(channel)
    finally:
        await server.stop(None)
        service.close()


def request(candidates: list[list[int]], prompt: list[int] = PROMPT) -> scoring_pb2.ScoreCandidatesRequest:
    return scoring_pb2.ScoreCandidatesRequest(
        prompt_token_ids=prompt, candidates=[scoring_pb2.Candidate(token_ids=ids) for ids in candidates]
    )


async def test_the_newest_reward_model_scores_and_a_newer_one_takes_over(data_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    backbone = AutoModelForCausalLM.from_pretrained(data_dir / "policies" / "v0000", dtype=torch.float32).eval()
    features = extract(backbone, to_tokens([PROMPT] * 3, CANDIDATES), FeatureSpec(meaning=(2,)), 8, lambda n: None)
    async with scoring(data_dir) as stub:
        for version, seed in (("rm0001", 1), ("rm0002", 2)):
            model = reward_model(seed)
            register(data_dir, version, model)
            answer = await stub.ScoreCandidates(request(CANDIDATES), timeout=30)
            assert answer.reward_model_version == version
            assert [one.score for one in answer.scores] == pytest.approx(model.scores(features).tolist(), abs=1e-5)
            found = torch.tensor([list(one.member_scores) for one in answer.scores])
            assert torch.allclose(found, model.member_scores(features).T, atol=1e-5)


@pytest.mark.parametrize(
    ("candidates", "prompt", "said"),
    [
        ([], PROMPT, "1 to 16 candidates"),
        ([[8]] * 17, PROMPT, "1 to 16 candidates"),
        ([[8], []], PROMPT, "at least one token"),
        ([[8]], [], "at least one token"),
        ([[8] * 62], PROMPT, "exceed 64 tokens"),
        ([[WORDS]], PROMPT, f"not in the model's vocabulary of {WORDS}"),
    ],
)
async def test_what_cannot_be_scored_is_refused(
    data_dir: Path, candidates: list[list[int]], prompt: list[int], said: str
) -> None:
    register(data_dir, "rm0001", reward_model(1))
    async with scoring(data_dir) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ScoreCandidates(request(candidates, prompt), timeout=30)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert said in str(error.value.details())
        assert len((await stub.ScoreCandidates(request([[8]]), timeout=30)).scores) == 1


async def test_before_the_first_round_and_without_its_files(data_dir: Path) -> None:
    async with scoring(data_dir) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ScoreCandidates(request([[8]]), timeout=30)
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "run a round first" in str(error.value.details())
        register(data_dir, "rm0001", reward_model(1))
        shutil.rmtree(data_dir / "reward_models" / "rm0001")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ScoreCandidates(request([[8]]), timeout=30)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_the_command_serves_until_it_is_stopped(data_dir: Path) -> None:
    register(data_dir, "rm0001", reward_model(1))
    command = [sys.executable, "-m", "learner.cli", "serve-scores", "--data-dir", str(data_dir), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline().startswith("computing in ")
            line = process.stdout.readline()
            assert line.startswith("serving scores on 127.0.0.1:")
            with grpc.insecure_channel(line.split()[-1]) as channel:
                answer = scoring_pb2_grpc.ScoringServiceStub(channel).ScoreCandidates(request([[8]]), timeout=60)
            assert answer.reward_model_version == "rm0001"
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


async def test_a_reward_model_of_another_model_scores_nothing(data_dir: Path) -> None:
    register(data_dir, "rm0001", reward_model(1))
    async with scoring(data_dir) as stub:
        assert (await stub.ScoreCandidates(request(CANDIDATES))).reward_model_version == "rm0001"
        store = Store.open(data_dir)
        store.policies.register(
            "v0001", kind="full", state="candidate", parent_version=None, reference_version="v0001", round_id=None,
            reward_model_version=None, metrics={},
        )  # fmt: skip
        store.policies.activate("v0001", actor="operator")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ScoreCandidates(request(CANDIDATES))
        assert error.value.details() == "There is no reward model yet: run a round first."
        store.policies.activate("v0000", actor="operator")
        assert (await stub.ScoreCandidates(request(CANDIDATES))).reward_model_version == "rm0001"
        store.close()

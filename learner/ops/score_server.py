"""`learner serve-scores`: reward models' scores over gRPC, for servers that choose which answers to compare.

The newest reward model of the active version's lineage scores: others read another model's features. One thread
computes, so that calls queue instead of competing for the cores. Every call checks for a newer reward model, so a new
one is used without a restart. Listens only on loopback: there are no keys yet.
"""

import asyncio
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import torch
from prefloop.v1 import scoring_pb2, scoring_pb2_grpc

from learner.model.device import resolve_device
from learner.model.features import TokenPair, extract
from learner.model.forward import to_tokens
from learner.reward.linear_reward_model import LinearRewardModel
from learner.settings import LearnerSettings
from server.shared.errors import FailedPreconditionError, InvalidArgumentError, ServiceError
from server.shared.model.dtype import DtypeName, resolve_dtype, torch_dtype
from server.shared.model.load import UntrustedCodeError, load_model
from server.store.files.manifest import verify
from server.store.files.sharing import fetch_all
from server.store.store import Store

LOOPBACK = "127.0.0.1"
MAX_CANDIDATES = 16
TOKENS_AT_ONCE = 1024
GRACE_SECONDS = 5.0
STATUS = {
    InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
}


class Scorer:
    """Scores with the newest reward model of the active version's reference. Used by a single thread."""

    def __init__(
        self,
        data_dir: Path,
        dtype: DtypeName,
        device: torch.device,
        max_model_len: int,
        trust_remote_code: bool = False,
    ) -> None:
        self._data_dir = data_dir
        self._dtype = torch_dtype(dtype)
        self._device = device
        self._max_model_len = max_model_len
        self._trust_remote_code = trust_remote_code
        self._store = Store.open(data_dir)
        self._reference: tuple[str, Any] = ("", None)
        self._loaded: tuple[str, LinearRewardModel] | None = None

    def score(self, pairs: list[TokenPair]) -> scoring_pb2.ScoreCandidatesResponse:
        """Raises FailedPreconditionError before the first reward model, InvalidArgumentError for unreadable tokens."""
        version, model, backbone = self._newest()
        words = backbone.config.vocab_size
        for prompt, response in pairs:
            if len(prompt) + len(response) > self._max_model_len:
                raise InvalidArgumentError("candidates", f"Prompt and candidate exceed {self._max_model_len} tokens.")
            if max(*prompt, *response) >= words:
                raise InvalidArgumentError("candidates", f"A token id is not in the model's vocabulary of {words}.")
        tokens = to_tokens([prompt for prompt, _ in pairs], [response for _, response in pairs])
        features = extract(backbone, tokens, model.spec, TOKENS_AT_ONCE, lambda n: None)
        scores, members = model.scores(features), model.member_scores(features)
        return scoring_pb2.ScoreCandidatesResponse(
            reward_model_version=version,
            scores=[
                scoring_pb2.CandidateScore(score=score, member_scores=said)
                for score, said in zip(scores.tolist(), members.T.tolist(), strict=True)
            ],
        )

    def close(self) -> None:
        self._store.close()

    def _newest(self) -> tuple[str, LinearRewardModel, Any]:
        reference = self._store.policies.reference()
        registered = self._store.reward_models.newest(reference) if reference else None
        if registered is None:
            raise FailedPreconditionError("NO_REWARD_MODEL", "There is no reward model yet: run a round first.")
        if self._loaded is None or self._loaded[0] != registered.version:
            # Its reference comes with it.
            fetch_all(self._store, self._data_dir)
            directory = self._data_dir / "reward_models" / registered.version
            verify(directory)
            self._loaded = registered.version, LinearRewardModel.load(directory)
        if self._reference[0] != registered.reference_version:
            directory = self._data_dir / "policies" / registered.reference_version
            verify(directory)
            try:
                backbone: Any = load_model(
                    directory, self._trust_remote_code, dtype=self._dtype, device_map=self._device
                )
            except UntrustedCodeError as error:
                raise FailedPreconditionError("UNTRUSTED_CODE", f"The model {error}") from error
            self._reference = registered.reference_version, backbone.eval()
        return *self._loaded, self._reference[1]


class ScoringService(scoring_pb2_grpc.ScoringServiceServicer):
    """Serves ScoreCandidates with a Scorer in a separate thread."""

    def __init__(self, make_scorer: Callable[[], Scorer]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scores")
        self._scorer = self._thread.submit(make_scorer).result()

    async def ScoreCandidates(
        self, request: scoring_pb2.ScoreCandidatesRequest, context: Any
    ) -> scoring_pb2.ScoreCandidatesResponse:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._scorer.score, to_pairs(request))
        except ServiceError as error:
            code = STATUS.get(type(error), grpc.StatusCode.UNAVAILABLE)
            await context.abort(code, str(error))
            raise  # Not reached: abort raises.

    def close(self) -> None:
        self._thread.submit(self._scorer.close).result()
        self._thread.shutdown()


def to_pairs(request: scoring_pb2.ScoreCandidatesRequest) -> list[TokenPair]:
    """(prompt, response) of every candidate. Raises InvalidArgumentError."""
    if not 1 <= len(request.candidates) <= MAX_CANDIDATES:
        raise InvalidArgumentError("candidates", f"Send 1 to {MAX_CANDIDATES} candidates.")
    if not request.prompt_token_ids or not all(one.token_ids for one in request.candidates):
        raise InvalidArgumentError("candidates", "The prompt and every candidate need at least one token.")
    prompt = list(request.prompt_token_ids)
    return [(prompt, list(one.token_ids)) for one in request.candidates]


async def serve_scores(settings: LearnerSettings, port: int, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; `say` gets dtype, device and address. Raises RuntimeError if the port is taken,
    FailedPreconditionError if there is no such device."""
    resolved, device = resolve_dtype(settings.dtype), resolve_device(settings.learner_device)
    say(f"computing in {resolved} on {device}")
    service = ScoringService(
        lambda: Scorer(settings.data_dir, resolved.name, device, settings.max_model_len, settings.trust_remote_code)
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(service, server)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        bound = server.add_insecure_port(f"{LOOPBACK}:{port}")
        await server.start()
        say(f"serving scores on {LOOPBACK}:{bound}")
        await stop.wait()
    finally:
        await server.stop(GRACE_SECONDS)
        service.close()

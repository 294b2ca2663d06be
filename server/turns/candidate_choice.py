"""Which second answer to show: the one about which the reward model's members disagree most whether it is better.

The members are fits of one reward model to different draws of the votes; a vote on what they dispute says most. Their
opinion comes from a ScoringService (`learner serve-scores`), which a comparison never needs: without one, or without
one in time, the first candidate does, which is as good as any.
"""

import logging
import math
from dataclasses import dataclass
from statistics import pvariance

import grpc
from prefloop.v1 import scoring_pb2, scoring_pb2_grpc

log = logging.getLogger(__name__)

OPTIONS = [
    # A proxy set for the network must not carry what users asked, nor can it reach this machine's own loopback.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


@dataclass(frozen=True)
class Chosen:
    """Which of the candidates, and the reward model whose members dispute it most; None where nobody was heard."""

    index: int
    reward_model_version: str | None


class CandidateChooser:
    """Chooses by the scores of the service at `address`, waiting for them at most `seconds`."""

    def __init__(self, address: str, seconds: float) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._scoring = scoring_pb2_grpc.ScoringServiceStub(self._channel)
        self._seconds = seconds
        self._complaint = ""

    async def choose(self, prompt: list[int], first: list[int], candidates: list[list[int]]) -> Chosen:
        """The candidate to show beside `first`; all are token ids. Whatever becomes of the service, there is one."""
        request = scoring_pb2.ScoreCandidatesRequest(
            prompt_token_ids=prompt,
            candidates=[scoring_pb2.Candidate(token_ids=token_ids) for token_ids in [first, *candidates]],
        )
        try:
            response = await self._scoring.ScoreCandidates(request, timeout=self._seconds)
            one, *others = [list(score.member_scores) for score in response.scores]
            disputes = [dispute(one, other) for other in others]
            if len(disputes) != len(candidates):
                raise ValueError(f"{len(candidates) + 1} answers were sent and {len(response.scores)} scores came")
        except grpc.aio.AioRpcError as error:
            # Of an exception in that service gRPC tells the text, which may quote what it was asked.
            details = "" if error.code() is grpc.StatusCode.UNKNOWN else f" {error.details()}"
            self._complain(f"{error.code().name}{details}")
        except Exception as error:
            self._complain(f"unreadable: {error}")
        else:
            self._complain("")
            return Chosen(disputes.index(max(disputes)), response.reward_model_version)
        return Chosen(0, None)

    async def close(self) -> None:
        await self._channel.close()

    def _complain(self, complaint: str) -> None:
        # Once, not with every comparison.
        if complaint != self._complaint:
            log.warning("comparisons: %s", f"any two, for want of scores: {complaint}" if complaint else "chosen again")
        self._complaint = complaint


def dispute(one: list[float], other: list[float]) -> float:
    """Variance, over the members, of the probability that `one` is better; both hold a score by each member."""
    # A sigmoid that no difference is too large for.
    return pvariance((1 + math.tanh((a - b) / 2)) / 2 for a, b in zip(one, other, strict=True))

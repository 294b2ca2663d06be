"""The client of `learner serve-scores`."""

import grpc
from prefloop.v1 import scoring_pb2, scoring_pb2_grpc

from server.turns.candidate_choice import Scores, ScoresError

OPTIONS = [
    # A network proxy must not see user messages, and cannot reach this machine's loopback.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


class ScoringClient:
    """Calls the ScoringService at `address`, and waits at most `seconds`."""

    def __init__(self, address: str, seconds: float) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._scoring = scoring_pb2_grpc.ScoringServiceStub(self._channel)
        self._seconds = seconds

    async def score(self, prompt: list[int], answers: list[list[int]]) -> Scores:
        """Score answers, each given as all its token ids. Raises ScoresError, also if it takes too long."""
        request = scoring_pb2.ScoreCandidatesRequest(
            prompt_token_ids=prompt, candidates=[scoring_pb2.Candidate(token_ids=token_ids) for token_ids in answers]
        )
        try:
            response = await self._scoring.ScoreCandidates(request, timeout=self._seconds)
        except grpc.aio.AioRpcError as error:
            # For an exception in the service, gRPC passes on its text, which may quote user messages.
            details = "" if error.code() is grpc.StatusCode.UNKNOWN else f" {error.details()}"
            raise ScoresError(f"{error.code().name}{details}") from error
        scores = [list(score.member_scores) for score in response.scores]
        if len(scores) != len(answers):
            raise ScoresError(f"invalid response: {len(scores)} scores for {len(answers)} answers")
        if len({len(members) for members in scores}) > 1 or not scores[0]:
            raise ScoresError("invalid response: not every answer has a score from each member")
        return Scores(response.reward_model_version, scores)

    async def close(self) -> None:
        await self._channel.close()

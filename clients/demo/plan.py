"""The demo's plan: its parts, the amount of work for this machine, and the time limit of each part.

The unit of time is measured: the seconds per answer on this machine, with sixteen asked for at once. Expected times and
limits are multiples of it, in numbers of answers. The factors come from runs on two cores: restricted to AVX2, an
answer took 0.55 s and a round 436 s.
"""

from dataclasses import dataclass

from clients.demo.questions import questions
from clients.demo.time_limit import Limit

CONCURRENCY = 16
# Concurrent comparisons of two answers each: larger batches, but fewer calls than the server allows one user.
VOTES_AT_ONCE = 24
FLIP_RATE = 0.1
# The maximum number of rounds, and the votes added before the next one.
ROUNDS = 2
MORE_VOTES = 100
# A vote needs two answers.
VOTE_ANSWERS = 2
# The cost of a round, and of its longest part without progress: a training step, or a candidate in the gate.
ROUND_ANSWERS = 1300
ROUND_STEP_ANSWERS = 100
SWAP_ANSWERS = 20
# Comparing a canary's answers, which the learner has sampled, beside long answers.
CANARY_ANSWERS = 100
# One of the long answers during the swap.
STORY_ANSWERS = 75
# A wait ends after this multiple of the expected time plus a minute, since the machine may be busy.
MARGIN = 5
SPARE_SECONDS = 60
# Extra time for a step of a round, in which the learner also starts its own engine.
STEP_SPARE_SECONDS = 300
# A GPU or a processor with many cores needs less per answer.
SLOW_SECONDS = 0.05
# The limit before anything has been measured.
FIRST_ANSWERS_SECONDS = 900


@dataclass(frozen=True)
class Work:
    """The amount of work: the maximum tokens of an answer, and the PPO steps (None: the learner's default)."""

    max_tokens: int = 64
    ppo_steps: int | None = None


def work_for(seconds_per_answer: float) -> Work:
    """The work for a machine that needs this long for an answer of `Work().max_tokens`. A slow machine gets shorter
    answers and fewer steps, never a weaker gate."""
    return Work() if seconds_per_answer < SLOW_SECONDS else Work(max_tokens=48, ppo_steps=8)


@dataclass(frozen=True)
class Plan:
    """The taste, the number of votes, and the number of questions before and after. A run resumes an earlier one only
    if all of these are the same."""

    taste: str
    votes: int
    held_out: int
    seed: int
    model: str | None

    def questions(self) -> tuple[list[str], list[str]]:
        """The held-out questions, and the questions to vote on."""
        asked = questions(self.seed)
        return asked[: self.held_out], asked[self.held_out :]

    @property
    def answers(self) -> int:
        """The cost of the whole demo in answers, without the server's start and stop."""
        return 2 * self.held_out + VOTE_ANSWERS * self.votes + ROUND_ANSWERS + SWAP_ANSWERS


@dataclass(frozen=True)
class Pace:
    """The speed of this machine, in seconds per answer under load."""

    seconds_per_answer: float

    def longest(self, answers: float) -> float:
        """The time limit in seconds for work that costs this many answers."""
        return SPARE_SECONDS + MARGIN * answers * self.seconds_per_answer

    def limit(self, what: str, answers: float) -> Limit:
        """The time limit of a wait for `what`."""
        return Limit(what, self.longest(answers))

    def round_limit(self) -> Limit:
        """The time limit of a round: one for each step, and a generous one for the whole."""
        silent = STEP_SPARE_SECONDS + self.longest(ROUND_STEP_ANSWERS)
        return Limit("The round", silent + self.longest(ROUND_ANSWERS), silent=silent)

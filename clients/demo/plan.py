"""What the demo does, how much of it this machine is asked for, and how long each part may take.

The unit of time is measured: the seconds that one answer takes here, where sixteen are asked for at once. Expected
times and limits are so many answers, by these factors. They come from runs on two cores: held back to AVX2 an answer
took 0.55 s and a round 436.
"""

from dataclasses import dataclass

from clients.demo.questions import questions
from clients.demo.time_limit import Limit

CONCURRENCY = 16
# Comparisons at once, each of two answers: more rows a step, and fewer calls than the server lets one user make.
VOTES_AT_ONCE = 24
FLIP_RATE = 0.1
# Rounds at most; before another one there are more votes.
ROUNDS = 2
MORE_VOTES = 100
# A vote is on two answers.
VOTE_ANSWERS = 2
# What a round takes, and the longest that it shows no progress: a step of training, or a candidate before the gate.
ROUND_ANSWERS = 850
ROUND_STEP_ANSWERS = 100
SWAP_ANSWERS = 20
# A long answer at the swap, alone.
STORY_ANSWERS = 75
# A wait ends after so many times what is expected, and a minute: the machine may have other things to do.
MARGIN = 5
SPARE_SECONDS = 60
# Of a step of a round, in which the learner also starts an engine of its own.
STEP_SPARE_SECONDS = 300
# An answer takes less on a GPU, or a processor of many cores.
SLOW_SECONDS = 0.05
# Before anything was measured.
FIRST_ANSWERS_SECONDS = 900


@dataclass(frozen=True)
class Work:
    """How much is asked for: the tokens of an answer at most, and the steps of PPO (None: the learner's own number)."""

    max_tokens: int = 64
    ppo_steps: int | None = None


def work_for(seconds_per_answer: float) -> Work:
    """What a machine is asked for that takes so long for an answer of `Work().max_tokens`. A slow one may be asked for
    shorter answers and fewer steps, never for a weaker gate."""
    return Work() if seconds_per_answer < SLOW_SECONDS else Work(max_tokens=48, ppo_steps=8)


@dataclass(frozen=True)
class Plan:
    """How many votes, how many questions before and after, and whose taste. Two runs go on with each other where these
    are the same."""

    taste: str
    votes: int
    held_out: int
    seed: int
    model: str | None

    def questions(self) -> tuple[list[str], list[str]]:
        """Those before and after, and those to vote on."""
        asked = questions(self.seed)
        return asked[: self.held_out], asked[self.held_out :]

    @property
    def answers(self) -> int:
        """All that the demo takes, in answers; its server's start and end beside."""
        return 2 * self.held_out + VOTE_ANSWERS * self.votes + ROUND_ANSWERS + SWAP_ANSWERS


@dataclass(frozen=True)
class Pace:
    """How fast this machine is, in seconds for one of many answers."""

    seconds_per_answer: float

    def longest(self, answers: float) -> float:
        """Seconds after which work of so many answers is given up."""
        return SPARE_SECONDS + MARGIN * answers * self.seconds_per_answer

    def limit(self, what: str, answers: float) -> Limit:
        """The end of a wait for `what`."""
        return Limit(what, self.longest(answers))

    def round_limit(self) -> Limit:
        """The end of a wait for a round: of each step of it, and a far one of all."""
        silent = STEP_SPARE_SECONDS + self.longest(ROUND_STEP_ANSWERS)
        return Limit("The round", silent + self.longest(ROUND_ANSWERS), silent=silent)

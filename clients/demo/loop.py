"""The demo's sequence: ask, vote, learn, swap, ask again. Each part resumes from the record."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from clients.client import Client
from clients.demo.machine import look
from clients.demo.many_calls import at_once
from clients.demo.plan import (
    CONCURRENCY,
    FIRST_ANSWERS_SECONDS,
    FLIP_RATE,
    MORE_VOTES,
    ROUNDS,
    STORY_ANSWERS,
    SWAP_ANSWERS,
    VOTE_ANSWERS,
    VOTES_AT_ONCE,
    Pace,
    work_for,
)
from clients.demo.processes import DemoError, Server
from clients.demo.progress import progress
from clients.demo.record import FinalError, Record
from clients.demo.rounds import forget_all, learn, wait_until_served
from clients.demo.show import say, show, show_estimate, show_found, show_swap
from clients.demo.time_limit import Limit
from clients.demo.voter import TASTES, Answer, Voter, ask


def demo(record: Record, console: Console) -> None:
    """Runs the loop once, without the parts that earlier runs have done."""
    if not record.finished:
        begin(record, console)
        with served(record, console) as server, Client(server.address, user="voter") as client:
            loop = Loop(record, console, server, client)
            loop.ask_before()
            loop.vote_and_learn()
            loop.swap()
            loop.ask_after()
            loop.stop()
    show(console, record)


def begin(record: Record, console: Console) -> None:
    """Shows the progress of an earlier run, or the expected duration."""
    if record.refused_twice:
        raise refusal(record)
    if record.begun:
        show_found(console, record)
        return
    with progress(console, "looking at this machine"):
        machine = look(record.directory, record.plan.model)
    for warning in machine.warnings:
        console.print(Text(warning))
    if machine.seconds_per_answer:
        show_estimate(console, record.plan, Pace(machine.seconds_per_answer))


@contextmanager
def served(record: Record, console: Console) -> Iterator[Server]:
    say(console, "1", f"a server on {record.directory}")
    with record.stage("server"), progress(console, "starting the server") as task:
        server = Server(record.directory, record.plan.model, task.say)
        server.start()
    with server:
        yield server


class Loop:
    """The parts of the demo that need its server, in order."""

    def __init__(self, record: Record, console: Console, server: Server, client: Client) -> None:
        self.record, self.console, self.server, self.client = record, console, server, client
        self.held_out, self.to_vote = record.plan.questions()

    def ask_before(self) -> None:
        """Asks the reference policy the held-out questions, and measures this machine's speed."""
        record, taste = self.record, TASTES[self.record.plan.taste]
        say(self.console, "2", f"the taste: {taste.sentence}; {FLIP_RATE:.0%} of the votes are flipped")
        if not record.forgotten:
            with record.stage("before"):
                if record.seconds_per_answer is None:
                    self.measure()
                self.ask_missing("asking, before", record.before)
                # The learner trains on users' questions. The held-out ones, which are all so far, must stay new to it.
                forget_all(self.client)
            with record.step():
                record.forgotten = True
        # A long answer during a round may take longer than usual.
        self.client.stream_timeout = max(self.client.stream_timeout, record.pace.longest(STORY_ANSWERS))

    def measure(self) -> None:
        """Times the first answers; all time limits are multiples of this."""
        record = self.record
        with record.step():
            record.before.clear()
        places = range(min(CONCURRENCY, len(self.held_out)))
        started = time.monotonic()
        self.ask("the first answers", places, record.before, Limit("The first answers", FIRST_ANSWERS_SECONDS))
        seconds_per_answer = (time.monotonic() - started) / len(places)
        with record.step():
            record.seconds_per_answer = seconds_per_answer
            if (work := work_for(seconds_per_answer)) != record.work:
                record.work, record.before = work, {}
        show_estimate(self.console, record.plan, record.pace)

    def vote_and_learn(self) -> None:
        """Votes and runs a round; if it is rejected, adds votes and runs another."""
        record = self.record
        for number in range(ROUNDS):
            if record.promoted:
                return
            if number:
                say(self.console, "3", f"{MORE_VOTES} more votes and another round")
            self.vote(record.plan.votes + number * MORE_VOTES)
            if len(record.reports) == number:
                say(self.console, "3", "one round of the learner; the server keeps serving")
                learn(record, self.console, self.server, self.client)
            if not record.promoted:
                self.console.print(Text(f"Rejected: {record.reports[number]['sentence']}"))
        if not record.promoted:
            raise refusal(record)

    def vote(self, votes: int) -> None:
        """Votes on one comparison for each of the first `votes` questions."""
        record, asked = self.record, self.to_vote[:votes]
        cast = {vote.comparison_id for vote in self.client.feedback()}
        left = [question for question in asked if record.compared.get(question) not in cast]
        if not left:
            return

        def compared(question: str, comparison_id: str) -> None:
            with record.step():
                record.compared[question] = comparison_id

        voter = Voter(
            TASTES[record.plan.taste], flip_rate=FLIP_RATE, max_tokens=record.work.max_tokens, seed=record.plan.seed
        )
        watch = self.watch(record.pace.limit("The voting", VOTE_ANSWERS * len(left)))
        with (
            record.stage("votes"),
            progress(self.console, "voting", len(asked), before=len(asked) - len(left)) as task,
        ):
            counts = voter.vote_on(
                self.client, left, concurrency=VOTES_AT_ONCE, on_vote=task.advance, before_vote=compared, watch=watch
            )
        self.console.print(f"{counts.a_or_b} choices ({counts.flipped} flipped), {counts.ties} ties")

    def swap(self) -> None:
        say(self.console, "4", "the swap")
        version = self.version
        limit = self.record.pace.limit(f"Loading {version} in the server", SWAP_ANSWERS)
        with self.record.stage("swap"), progress(self.console, "waiting for the swap"):
            wait_until_served(self.client, version, limit)
        show_swap(self.console, self.record, version)

    def ask_after(self) -> None:
        say(self.console, "5", "the same questions again")
        with self.record.stage("after"):
            self.ask_missing("asking, after", self.record.after)
        if others := {answer.policy_version for answer in self.record.after.values()} - {self.version}:
            raise DemoError(f"{', '.join(sorted(others))} answered after the swap, not {self.version}.")

    def stop(self) -> None:
        """Stops the server; the demo is finished only if that succeeds."""
        with self.record.stage("stop"), progress(self.console, "stopping the server"):
            self.server.stop()
        with self.record.step():
            self.record.finished = True

    @property
    def version(self) -> str:
        assert self.record.promoted
        return str(self.record.promoted["policy_version"])

    def ask_missing(self, title: str, answers: dict[int, Answer]) -> None:
        if places := [place for place in range(len(self.held_out)) if place not in answers]:
            self.ask(title, places, answers, self.record.pace.limit(title.capitalize(), len(places)))

    def ask(self, title: str, places: Sequence[int], answers: dict[int, Answer], limit: Limit) -> None:
        """Asks the question at each index in `places`; the index is also the seed."""

        def one(place: int) -> tuple[int, Answer]:
            max_tokens = self.record.work.max_tokens
            return place, ask(self.client, self.held_out[place], max_tokens=max_tokens, seed=place)

        def keep(answered: tuple[int, Answer]) -> None:
            with self.record.step():
                answers.update([answered])
            task.advance()

        with progress(self.console, title, len(answers) + len(places), before=len(answers)) as task:
            at_once(one, places, concurrency=CONCURRENCY, on_result=keep, watch=self.watch(limit))

    def watch(self, limit: Limit) -> Callable[[], None]:
        """A check that raises if the server has ended or the time is up."""

        def look() -> None:
            self.server.check()
            limit.check()

        return look


def refusal(record: Record) -> DemoError:
    """The error for a learner that rejected every round; the demo cannot be resumed."""
    said = record.reports[-1]["sentence"]
    return FinalError(
        f"The learner rejected both rounds, the last one with: {said} Remove {record.directory} to start over."
    )

"""`learner judge`: asks a model about comparisons that it has not seen, and stores what it says as it comes."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field

from openai import OpenAI, OpenAIError

from learner.judge.question import SWAPPED, Message, ask, read
from learner.judge_settings import JudgeSettings
from learner.reward.dataset import is_judge
from learner.round.token_ids import asked_turns
from learner.settings import LearnerSettings
from server.shared.errors import FailedPreconditionError, NotFoundError, UnavailableError
from server.store.chats.machine_choices import Asked, Verdict
from server.store.chats.records import Comparison
from server.store.store import Store

# A letter, and whatever a chatty model says before it.
ANSWER_TOKENS = 8
# How often a request is repeated that an endpoint refuses for now.
RETRIES = 5


@dataclass
class Used:
    """What a run used so far."""

    pairs: int = 0
    unreadable: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def cost(self, settings: JudgeSettings) -> float:
        """In the currency of the prices."""
        return (self.prompt_tokens * settings.prompt_price + self.answer_tokens * settings.answer_price) / 1_000_000


@dataclass(frozen=True)
class Pair:
    """A comparison with the conversation that its answers continue."""

    asked: Asked
    comparison: Comparison
    conversation: list[Message]


class Endpoint:
    """The judge's model, asked at no more than the set rate. Its client repeats a request that was refused for now, as
    the endpoint asks it to."""

    def __init__(self, settings: JudgeSettings, used: Used) -> None:
        self._settings, self._used = settings, used
        self._client = OpenAI(
            base_url=settings.url,
            api_key=settings.api_key.get_secret_value() or "none",
            timeout=settings.timeout_seconds,
            max_retries=RETRIES,
        )
        self._next, self._turn = 0.0, threading.Lock()
        # Nobody who wrote a text knows it.
        self._secret = secrets.token_hex()

    def judge(self, pair: Pair) -> tuple[Verdict, Verdict]:
        """What it says of a pair as it was shown and with the answers swapped, both in terms of the pair's A and B."""
        a, b = pair.comparison.a.text, pair.comparison.b.text
        return self._ask(pair, a, b), SWAPPED[self._ask(pair, b, a)]

    def _ask(self, pair: Pair, a: str, b: str) -> Verdict:
        self._wait()
        question = ask(self._settings.rubric, pair.conversation, a, b, self._secret + pair.comparison.id)
        reply = self._client.chat.completions.create(
            model=self._settings.model,
            messages=question,  # type: ignore[arg-type]
            temperature=0.0,
            max_tokens=ANSWER_TOKENS,
        )
        with self._used.lock:
            if reply.usage:
                self._used.prompt_tokens += reply.usage.prompt_tokens
                self._used.answer_tokens += reply.usage.completion_tokens
        return read(reply.choices[0].message.content or "")

    def _wait(self) -> None:
        """Waits for this request's turn."""
        with self._turn:
            at = max(self._next, time.monotonic())
            self._next = at + 60 / self._settings.requests_per_minute
        time.sleep(max(at - time.monotonic(), 0.0))


def judge_comparisons(settings: LearnerSettings, on_pair: Callable[[Used, int], None]) -> Used:
    """Judges comparisons of conversations that train, at most `judge.pairs`; those that were judged before stay as they
    are, so a run that was stopped is continued by the next one. `on_pair` hears of each, and of how many there are.

    Raises FailedPreconditionError if no judge is set, and UnavailableError if it cannot be asked."""
    if not settings.judge.url:
        raise FailedPreconditionError("NO_JUDGE", "No judge is set: give judge.url and judge.model.")
    with closing(Store.open(settings.data_dir)) as store:
        pairs, used = missing_pairs(store, settings), Used()
        endpoint = Endpoint(settings.judge, used)
        try:
            for pair, (shown, swapped) in judged(endpoint, pairs, settings.judge.concurrency):
                store.machine_choices.add(pair.asked, settings.judge.name, shown, swapped)
                used.pairs += 1
                used.unreadable += "UNREADABLE" in (shown, swapped)
                on_pair(used, len(pairs))
        except OpenAIError as error:
            raise UnavailableError(
                f"The judge at {settings.judge.url} cannot be asked: {error}. "
                f"{used.pairs} of {len(pairs)} comparisons are judged; the next run goes on from there."
            ) from error
        return used


def missing_pairs(store: Store, settings: LearnerSettings) -> list[Pair]:
    """The comparisons to judge. The judge's side of the votes is left to people, and so are users in quarantine."""
    found = list[Pair]()
    for asked in store.machine_choices.missing(settings.judge.name, store.quarantine.current()):
        together = store.snapshots.voted_with(asked.comparison_id, asked.conversation_id)
        if not is_judge(together, settings.gate.judge_share) and (pair := read_pair(store, asked)):
            found.append(pair)
        if len(found) == settings.judge.pairs:
            break
    return found


def read_pair(store: Store, asked: Asked) -> Pair | None:
    """The comparison with its conversation; None if it was deleted."""
    try:
        comparison = store.responses.comparison(asked.user, asked.comparison_id)
    except NotFoundError:
        return None
    turn = asked_turns(store, asked.user, asked.conversation_id).get(comparison.a.id)
    if turn is None:
        return None
    conversation: list[Message] = []
    for message, answer in turn.said[: turn.before]:
        conversation += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    return Pair(asked, comparison, [*conversation, {"role": "user", "content": turn.message}])


def judged(endpoint: Endpoint, pairs: list[Pair], concurrency: int) -> Iterator[tuple[Pair, tuple[Verdict, Verdict]]]:
    """Each pair with what was said of it, as it comes. Only so many are under way, so that what fails ends soon."""
    waiting, running = iter(pairs), dict[Future[tuple[Verdict, Verdict]], Pair]()
    with ThreadPoolExecutor(concurrency) as pool:
        for pair in waiting:
            running[pool.submit(endpoint.judge, pair)] = pair
            if len(running) == concurrency:
                yield from _finished(running)
        while running:
            yield from _finished(running)


def _finished(
    running: dict[Future[tuple[Verdict, Verdict]], Pair],
) -> Iterator[tuple[Pair, tuple[Verdict, Verdict]]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()

"""`learner judge`: asks a model about comparisons that it has not seen, and stores what it says as it comes."""

import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice

from openai import APIStatusError, BadRequestError, DefaultHttpxClient, OpenAI, OpenAIError, UnprocessableEntityError

from learner.judge.question import SWAPPED, ask, read
from learner.judge_settings import JudgeSettings
from learner.reward.dataset import is_judge
from learner.round.token_ids import asked_turns
from learner.settings import LearnerSettings
from server.shared.errors import FailedPreconditionError, NotFoundError, UnavailableError
from server.shared.model.prompt import Message, to_messages
from server.store.chats.machine_choices import Asked, Verdict
from server.store.chats.records import Comparison
from server.store.store import Store

# So many replies that cannot be read, and none that can, say that the endpoint is not set up for this.
GIVE_UP = 10
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


# A pair, and what was said of it as it was shown and with the answers swapped.
Said = tuple[Pair, tuple[Verdict, Verdict]]


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
            # Users' texts go to the host that was named and nowhere else: to no proxy, and after no redirect.
            http_client=DefaultHttpxClient(trust_env=False, follow_redirects=False),
        )
        self._client.organization = self._client.project = None
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
        try:
            reply = self._client.chat.completions.create(
                model=self._settings.model,
                messages=question,  # type: ignore[arg-type]
                temperature=0.0,
                max_tokens=self._settings.max_tokens,
                extra_body=self._settings.extra_body or None,
            )
        except (BadRequestError, UnprocessableEntityError):
            # Too long for it, or filtered: the other pairs may be fine.
            return "UNREADABLE"
        with self._used.lock:
            if reply.usage:
                self._used.prompt_tokens += reply.usage.prompt_tokens
                self._used.answer_tokens += reply.usage.completion_tokens
        return read((reply.choices[0].message.content or "") if reply.choices else "")

    def close(self) -> None:
        """Ends the requests that are under way."""
        self._client.close()

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
    try:
        judge = settings.judge.name
    except (OSError, UnicodeDecodeError) as error:
        raise FailedPreconditionError("NO_RUBRIC", f"judge.rubric_file cannot be read: {error}.") from error
    with closing(Store.open(settings.data_dir)) as store:
        asked, used = missing(store, settings), Used()
        endpoint = Endpoint(settings.judge, used)
        said = judged(endpoint, pairs(store, asked), settings.judge.concurrency)
        try:
            for pair, (shown, swapped) in readable(said):
                store.machine_choices.add(pair.asked, judge, shown, swapped)
                used.pairs += 1
                used.unreadable += "UNREADABLE" in (shown, swapped)
                on_pair(used, len(asked))
        except OpenAIError as error:
            raise UnavailableError(
                f"The judge at {settings.judge.url} cannot be asked ({named(error)}). "
                f"{used.pairs} of {len(asked)} comparisons are judged; the next run goes on from there."
            ) from error
        finally:
            said.close()
        return used


def named(error: OpenAIError) -> str:
    """What failed, without the endpoint's own words, which may quote a user."""
    if isinstance(error, APIStatusError):
        return f"it answered with status {error.status_code}"
    return type(error).__name__


def missing(store: Store, settings: LearnerSettings) -> list[Asked]:
    """The comparisons to judge, at most `judge.pairs`. The judge's side of the votes is left to people. Users in
    quarantine are left out."""
    asked = store.machine_choices.missing(settings.judge.name, store.quarantine.current())
    together = store.snapshots.voted_with(asked)
    trains = (one for one in asked if not is_judge(together[one.comparison_id], settings.gate.judge_share))
    return list(islice(trains, settings.judge.pairs))


def pairs(store: Store, asked: list[Asked]) -> Iterator[Pair]:
    """Each is read when its turn comes: what was deleted by then, or whose user is in quarantine, is not sent."""
    for one in asked:
        if one.user not in store.quarantine.current() and (pair := read_pair(store, one)):
            yield pair


def readable(said: Iterator[Said]) -> Iterator[Said]:
    """What was said, once one reply could be read. Raises FailedPreconditionError if many are none."""
    held = list[Said]()
    for one in said:
        held.append(one)
        if "UNREADABLE" not in one[1]:
            break
        if len(held) == GIVE_UP:
            raise FailedPreconditionError(
                "NO_VERDICTS",
                f"None of the first {GIVE_UP} comparisons got a letter as reply; nothing was stored. A model that "
                "reasons first needs judge.max_tokens, or judge.extra_body to keep it from that.",
            )
    yield from chain(held, said)


def read_pair(store: Store, asked: Asked) -> Pair | None:
    """The comparison with its conversation; None if it was deleted."""
    try:
        comparison = store.responses.comparison(asked.user, asked.comparison_id)
    except NotFoundError:
        return None
    turn = asked_turns(store, asked.user, asked.conversation_id).get(comparison.a.id)
    if turn is None:
        return None
    return Pair(asked, comparison, to_messages(turn.said[: turn.before], turn.message, turn.system))


def judged(endpoint: Endpoint, waiting: Iterator[Pair], concurrency: int) -> Generator[Said]:
    """Each pair with what was said of it, as it comes; only so many are under way. Whoever ends it early ends them."""
    running, pool = dict[Future[tuple[Verdict, Verdict]], Pair](), ThreadPoolExecutor(concurrency)
    try:
        for pair in waiting:
            running[pool.submit(endpoint.judge, pair)] = pair
            if len(running) == concurrency:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    finally:
        endpoint.close()
        pool.shutdown(wait=False, cancel_futures=True)


def _finished(running: dict[Future[tuple[Verdict, Verdict]], Pair]) -> Iterator[Said]:
    """Those that are done; those that failed come last, since the others are paid for."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in sorted(done, key=lambda future: future.exception() is not None):
        yield running.pop(future), future.result()

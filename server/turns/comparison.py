"""The two answers of a comparison: their versions, temperatures and streams."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

from server.engine.base import Sampling
from server.store.chats.records import Comparison, Generation, Slot
from server.turns.answers import Answers
from server.turns.candidate_choice import CandidateChooser

SLOTS: tuple[Slot, Slot] = ("A", "B")
# WriteDelta takes a slot and a piece of its text, Ended a slot, the response's id and the whole answer.
WriteDelta = Callable[[Slot, str], Awaitable[None]]
Ended = Callable[[Slot, str, Generation], Awaitable[None]]
# The slot, the response's id, how it is sampled, and the version to sample from; None: the loaded one.
Planned = tuple[Slot, str, Sampling, str | None]


def arrange(
    pair: tuple[str, str] | None, loaded: str, sampling: Sampling, temperatures: tuple[float, float]
) -> tuple[tuple[str, str], tuple[Sampling, Sampling]]:
    """The versions and samplings of A and B: two versions at one temperature, so that nothing else differs, or the
    loaded version at two temperatures. Which one is A is random."""
    if pair:
        one, other = random.sample(pair, 2)
        return (one, other), two_samplings(sampling, sampling.temperature, sampling.temperature)
    low, high = random.sample(temperatures, 2)
    return (loaded, loaded), two_samplings(sampling, low, high)


def two_samplings(base: Sampling, a: float, b: float) -> tuple[Sampling, Sampling]:
    """Samplings at two temperatures, with different seeds so that answers at equal temperatures differ."""
    first, second = (None, None) if base.seed is None else (base.seed, (base.seed + 1) % 2**63)
    return replace(base, temperature=a, seed=first), replace(base, temperature=b, seed=second)


async def stream_answers(
    answers: Answers,
    chooser: CandidateChooser | None,
    sampled: int,
    prompt: list[int],
    planned: list[Planned],
    write: WriteDelta,
    ended: Ended,
) -> None:
    """Stream both; with a chooser, the second one is chosen among `sampled` - 1. The first failure ends both."""
    try:
        if chooser:
            await _stream_chosen(answers, chooser, sampled, prompt, planned, write, ended)
        else:
            async with asyncio.TaskGroup() as both:
                for each in planned:
                    both.create_task(_stream_one(answers, prompt, each, write, ended))
    except ExceptionGroup as group:
        raise group.exceptions[0] from group


async def repeat_answers(stored: Comparison, write: WriteDelta, ended: Ended) -> None:
    """Write a stored comparison, each answer as a whole."""
    for slot, response in zip(SLOTS, (stored.a, stored.b), strict=True):
        await write(slot, response.text)
        await ended(slot, response.id, response.generation)


async def _stream_one(
    answers: Answers, prompt: list[int], planned: Planned, write: WriteDelta, ended: Ended
) -> Generation:
    slot, response_id, sampling, version = planned
    generation = await answers.sample(response_id, prompt, sampling, lambda text: write(slot, text), version)
    await ended(slot, response_id, generation)
    return generation


async def _stream_chosen(
    answers: Answers,
    chooser: CandidateChooser,
    sampled: int,
    prompt: list[int],
    planned: list[Planned],
    write: WriteDelta,
    ended: Ended,
) -> None:
    """Stream one answer; choose the other when all have ended, and send it as a whole. Which of them is A is random."""
    streamed, (slot, response_id, sampling, _) = random.sample(planned, 2)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(_stream_one(answers, prompt, streamed, write, ended))
        unseen = [group.create_task(answers.sample_unseen(prompt, sampling)) for _ in range(sampled - 1)]
    candidates = [task.result() for task in unseen]
    chosen = await chooser.choose(prompt, first.result().token_ids, [one.token_ids for one in candidates])
    generation = candidates[chosen.index]
    await answers.keep(response_id, generation, chosen.reward_model_version)
    await write(slot, generation.text)
    await ended(slot, response_id, generation)

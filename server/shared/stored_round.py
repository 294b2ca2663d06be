"""A round's settings and metrics in the store, as JSON, and how those that earlier versions wrote are read.

With them stands the number of the format that they are in; where none does, it is 0, which is all that commits up to
a51ccdf wrote. Reading takes what is stored through every upgrade since its format, so that whoever reads a round knows
one format alone. An upgrade is not changed once it is released: the next one mends it. It must bear with what is not
there, since a round has its metrics stage by stage.

What a newer version wrote is read as it is, with its number left in it as `format`. It can be shown; a round does not
resume on settings that it does not know.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.shared.tables import flatten, nest

FORMAT = "format"
# What an answer with its prompt counts for where `ppo.micro_batch` was set, which counted answers.
ANSWER_TOKENS = 128
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Stored:
    """The current format of one of the two: its number is how many upgrades there are, the first one from format 0."""

    upgrades: tuple[Upgrade, ...]

    def dump(self, values: dict[str, Any]) -> str:
        return json.dumps({FORMAT: len(self.upgrades), **values})

    def load(self, text: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(text)
        number = values.get(FORMAT, 0)
        if number > len(self.upgrades):
            return values
        values.pop(FORMAT, None)
        for upgrade in self.upgrades[number:]:
            values = upgrade(values)
        return values


def start_from(settings: dict[str, Any]) -> str:
    """What the round began from: `reference`, or the policy that was `active`."""
    return str(settings.get("policy", {}).get("start_from", "reference"))


def _name_shares_and_dtype(settings: dict[str, Any]) -> dict[str, Any]:
    """The learner's share of a GPU has a name of its own, and the dtype is the engine's too. Two older changes, from
    before there were numbers, are made up for: the schedule's table, and what `active` was called."""
    names = {
        "gpu_memory_share": "learner_gpu_memory_share",
        "ppo.dtype": "dtype",
        "schedule_cron": "schedule.cron",
    }
    values = {names.get(name, name): value for name, value in flatten(settings).items()}
    if values.get("ppo.start_from") == "incumbent":
        values["ppo.start_from"] = "active"
    return nest(values)


def _count_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch is so many tokens, no longer so many answers."""
    values = flatten(settings)
    if answers := values.pop("ppo.micro_batch", None):
        values["ppo.micro_batch_tokens"] = answers * ANSWER_TOKENS
    return nest(values)


def _count_left_out(metrics: dict[str, Any]) -> dict[str, Any]:
    """Votes that could not be read, and those of users in quarantine, are counted."""
    if votes := metrics.get("votes"):
        metrics["votes"] = {"left_out": 0, "quarantined": 0, **votes}
    return metrics


def _sort_by_room(settings: dict[str, Any]) -> dict[str, Any]:
    """What is of the policy in training stands in a table of its own, whatever improves it."""
    moved = ("train", "start_from", "lora_rank", "lora_alpha", "micro_batch_tokens", "mismatch_limit", "kl_budget")
    names = {f"ppo.{name}": f"policy.{name}" for name in moved} | {"duel_user_votes": "ab_test_user_votes"}
    return nest({names.get(name, name): value for name, value in flatten(settings).items()})


SETTINGS = Stored((_name_shares_and_dtype, _count_tokens, _sort_by_room))
METRICS = Stored((_count_left_out,))

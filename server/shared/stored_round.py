"""A round's settings and metrics in the store, as JSON, and upgrades from earlier formats.

The JSON has the number of its format; without one it is format 0, which commits up to a51ccdf wrote. Loading applies
every upgrade since that format, so that readers only know the current one. A released upgrade is never changed; a later
one corrects it. Upgrades must accept missing keys, since a round gets its metrics stage by stage.

JSON from a newer version is loaded unchanged, with its number left in it as `format`. It can be shown, but a round does
not resume with settings that it does not know.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.shared.tables import flatten, nest

FORMAT = "format"
# Tokens for each answer with its prompt of `ppo.micro_batch`, which counted answers.
ANSWER_TOKENS = 128
# Settings that were in the table `ppo` before there was a table `policy`.
ONCE_OF_PPO = (
    "train", "start_from", "lora_rank", "lora_alpha", "micro_batch_tokens", "mismatch_limit", "kl_budget"
)  # fmt: skip
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Stored:
    """The current format of settings or metrics. Its number is the number of upgrades; the first is from format 0."""

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
    """What the round started from: `reference`, or the `active` policy."""
    return str(settings.get("policy", {}).get("start_from", "reference"))


def _name_shares_and_dtype(settings: dict[str, Any]) -> dict[str, Any]:
    """Rename the learner's share of a GPU, and the dtype, which the engine now uses too. Also apply two changes from
    before formats had numbers: the schedule's table, and the old name of `active`."""
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
    """Convert the size of a micro-batch from answers to tokens."""
    values = flatten(settings)
    if answers := values.pop("ppo.micro_batch", None):
        values["ppo.micro_batch_tokens"] = answers * ANSWER_TOKENS
    return nest(values)


def _count_left_out(metrics: dict[str, Any]) -> dict[str, Any]:
    """Add the counts of unreadable votes and of votes of users in quarantine."""
    if votes := metrics.get("votes"):
        metrics["votes"] = {"left_out": 0, "quarantined": 0, **votes}
    return metrics


def _sort_by_room(settings: dict[str, Any]) -> dict[str, Any]:
    """Move settings of the policy in training, which do not depend on PPO, to a separate table."""
    names = {f"ppo.{name}": f"policy.{name}" for name in ONCE_OF_PPO} | {"duel_user_votes": "ab_test_user_votes"}
    return nest({names.get(name, name): value for name, value in flatten(settings).items()})


def _keep_activations(settings: dict[str, Any]) -> dict[str, Any]:
    """Earlier rounds kept all activations, and continue to: computed again, numbers might differ in the last bit."""
    return {**settings, "policy": {"checkpoint_activations": "off", **settings.get("policy", {})}}


def _count_flips(settings: dict[str, Any]) -> dict[str, Any]:
    """The signal test flips signs instead of permuting votes: fewer than the default were never needed."""
    reward = {name: value for name, value in settings.get("reward", {}).items() if name != "permutations"}
    return {**settings, "reward": reward} if reward else settings


def _forget_permutations(metrics: dict[str, Any]) -> dict[str, Any]:
    """A signal test by permutations had no level of its own, and compared with the accuracy on shuffled votes."""
    if signal := metrics.get("signal"):
        metrics["signal"] = {
            **{name: value for name, value in signal.items() if name != "null_accuracy"},
            **{"level": None, "votes": 0, "conversations": 0, "first_votes": 0, "enough_votes": None, "spent": []},
        }
    return metrics


def _confirm_on_others(settings: dict[str, Any]) -> dict[str, Any]:
    """The gate looks after each batch of the prompts that confirm a candidate, not once early."""
    return nest({name: value for name, value in flatten(settings).items() if name != "gate.early_share"})


def _name_best_margin(settings: dict[str, Any]) -> dict[str, Any]:
    """A canary needs no margin; the one for the best version has its own name."""
    renamed = {"gate.canary_margin": "gate.best_margin"}
    return nest({renamed.get(name, name): value for name, value in flatten(settings).items()})


def _hold_the_budget(settings: dict[str, Any]) -> dict[str, Any]:
    """The KL budget did not move with the served version."""
    policy = settings.get("policy", {})
    return {**settings, "policy": {"kl_total": policy.get("kl_budget", 6.0), **policy}}


def _step_alike(settings: dict[str, Any]) -> dict[str, Any]:
    """Updates took the whole learning rate however long answers were, and only the KL of whole answers had a budget."""
    ppo, policy = {"full_step_tokens": 1e9}, {"kl_per_token": 1e9}
    return {
        **settings,
        "ppo": {**ppo, **settings.get("ppo", {})},
        "policy": {**policy, **settings.get("policy", {})},
    }


def _drop_gap_margin(settings: dict[str, Any]) -> dict[str, Any]:
    """A candidate is over-optimised if an earlier one is better for certain; there is no margin."""
    return nest({name: value for name, value in flatten(settings).items() if name != "gate.gap_margin"})


def _name_improvement(metrics: dict[str, Any]) -> dict[str, Any]:
    """PPO was the only way to improve a policy, and its stage had its name."""
    metrics = {"improvement" if name == "ppo" else name: value for name, value in metrics.items()}
    if seconds := metrics.get("seconds"):
        metrics["seconds"] = {"improve" if name == "ppo" else name: value for name, value in seconds.items()}
    return metrics


SETTINGS = Stored(
    (
        _name_shares_and_dtype,
        _count_tokens,
        _sort_by_room,
        _keep_activations,
        _count_flips,
        _confirm_on_others,
        _name_best_margin,
        _hold_the_budget,
        _step_alike,
        _drop_gap_margin,
    )
)
METRICS = Stored((_count_left_out, _forget_permutations, _name_improvement))

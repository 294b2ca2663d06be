"""A stored round is loaded in the current format, whatever format it was written in."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from server.shared import stored_round
from server.shared.stored_round import METRICS, SETTINGS, Stored, start_from
from server.store.learning.round_metrics import RoundMetrics
from server.store.store import Store
from tests.server.store.test_lineage import lease

# What every earlier round did.
STEPS = {"full_step_tokens": 1e9}
HELD = {"policy": {"kl_total": 6.0, "kl_per_token": 1e9}, "ppo": STEPS}
KEPT = {"policy": {"checkpoint_activations": "off", **HELD["policy"]}, "ppo": STEPS}


def test_a_format_is_read_through_every_upgrade_since() -> None:
    def first(values: dict[str, Any]) -> dict[str, Any]:
        return {"b": values["a"] + 1}

    def second(values: dict[str, Any]) -> dict[str, Any]:
        return {"c": values["b"] * 10}

    stored = Stored((first, second))
    assert stored.load('{"a": 1}') == {"c": 20}
    assert stored.load('{"format": 0, "a": 1}') == {"c": 20}
    assert stored.load('{"format": 1, "b": 3}') == {"c": 30}
    assert stored.load('{"format": 2, "c": 4}') == {"c": 4}
    assert json.loads(stored.dump({"c": 4})) == {"format": 2, "c": 4}
    # JSON of a newer version stays unchanged, also when it is written again.
    newer = {"format": 3, "d": 5}
    assert stored.load(json.dumps(newer)) == newer
    assert json.loads(stored.dump(newer)) == newer


def test_settings_of_format_0() -> None:
    old = {"seed": 1, "gpu_memory_share": 0.2, "ppo": {"dtype": "float32", "steps": 3}}
    assert SETTINGS.load(json.dumps(old)) == {
        "seed": 1, "learner_gpu_memory_share": 0.2, "dtype": "float32", **KEPT, "ppo": {**STEPS, "steps": 3}
    }  # fmt: skip
    older = {"schedule_cron": "0 4 * * *", "ppo": {"start_from": "incumbent", "dtype": "bfloat16"}}
    assert SETTINGS.load(json.dumps(older)) == {
        "schedule": {"cron": "0 4 * * *"}, "policy": {**KEPT["policy"], "start_from": "active"}, "dtype": "bfloat16",
        "ppo": STEPS,
    }  # fmt: skip
    assert (SETTINGS.load("{}"), METRICS.load("{}")) == (KEPT, {})


def test_settings_of_format_1() -> None:
    assert SETTINGS.load('{"format": 1, "seed": 1, "ppo": {"micro_batch": 4, "steps": 3}}') == {
        "seed": 1, "policy": {**KEPT["policy"], "micro_batch_tokens": 512}, "ppo": {**STEPS, "steps": 3}
    }  # fmt: skip
    assert SETTINGS.load('{"format": 1, "ppo": {"steps": 3}}') == {**KEPT, "ppo": {**STEPS, "steps": 3}}


def test_settings_of_format_2() -> None:
    old = {"format": 2, "duel_user_votes": 4, "ppo": {"train": "full", "kl_budget": 3.0, "steps": 3}}
    assert SETTINGS.load(json.dumps(old)) == {
        "ab_test_user_votes": 4,
        "policy": {**KEPT["policy"], "train": "full", "kl_budget": 3.0, "kl_total": 3.0},
        "ppo": {**STEPS, "steps": 3},
    }


def test_settings_of_format_3() -> None:
    old = {"format": 3, "seed": 1, "policy": {"kl_budget": 3.0}}
    assert SETTINGS.load(json.dumps(old)) == {
        "seed": 1,
        "policy": {**KEPT["policy"], "kl_budget": 3.0, "kl_total": 3.0},
        "ppo": STEPS,
    }


def test_settings_of_format_4() -> None:
    old = {"format": 4, "reward": {"permutations": 199, "folds": 5}}
    assert SETTINGS.load(json.dumps(old)) == {"reward": {"folds": 5}, **HELD}


def test_settings_of_format_5() -> None:
    old = {"format": 5, "gate": {"early_share": 0.2, "prompts": 64}}
    assert SETTINGS.load(json.dumps(old)) == {"gate": {"prompts": 64}, **HELD}
    assert SETTINGS.load(json.dumps({"format": 5, "seed": 1, "gate": {"early_share": 0.2}})) == {"seed": 1, **HELD}


def test_settings_of_format_6() -> None:
    old = {"format": 6, "seed": 1, "gate": {"canary_margin": 0.03, "prompts": 32}}
    assert SETTINGS.load(json.dumps(old)) == {"seed": 1, "gate": {"best_margin": 0.03, "prompts": 32}, **HELD}


def test_settings_of_format_7() -> None:
    # The budget that a round began with does not move.
    old = {"format": 7, "policy": {"kl_budget": 3.0, "train": "full"}}
    assert SETTINGS.load(json.dumps(old)) == {
        "policy": {**HELD["policy"], "kl_budget": 3.0, "kl_total": 3.0, "train": "full"},
        "ppo": STEPS,
    }
    assert SETTINGS.load(json.dumps({"format": 7, "seed": 1})) == {"seed": 1, **HELD}


def test_settings_of_format_8() -> None:
    # Updates on long answers are as large as when the round began, and only whole answers have a budget.
    old = {"format": 8, "policy": {"train": "full"}, "ppo": {"steps": 3}}
    assert SETTINGS.load(json.dumps(old)) == {
        "policy": {"train": "full", "kl_per_token": 1e9},
        "ppo": {"steps": 3, "full_step_tokens": 1e9},
    }


def test_settings_of_format_9() -> None:
    old = {"format": 9, "seed": 1, "gate": {"gap_margin": 0.05, "prompts": 64}}
    assert SETTINGS.load(json.dumps(old)) == {"seed": 1, "gate": {"prompts": 64}}
    assert SETTINGS.load(json.dumps({"format": 9, "seed": 1, "gate": {"gap_margin": 0.1}})) == {"seed": 1}


def test_metrics_of_format_2() -> None:
    # PPO's stage is that of any improver.
    old = {"format": 2, "ppo": {"steps": []}, "seconds": {"ppo": 3.0, "gate": 1.0}}
    assert METRICS.load(json.dumps(old)) == {"improvement": {"steps": []}, "seconds": {"improve": 3.0, "gate": 1.0}}
    assert METRICS.load(json.dumps({"format": 2, "votes": {"choices": 3}})) == {"votes": {"choices": 3}}


def test_metrics_of_format_1() -> None:
    old = {"format": 1, "signal": {"accuracy": 0.68, "null_accuracy": 0.5, "p_value": 0.005}}
    loaded = METRICS.load(json.dumps(old))
    assert loaded["signal"] == {
        **{"accuracy": 0.68, "p_value": 0.005, "level": None, "votes": 0, "conversations": 0, "first_votes": 0},
        **{"enough_votes": None, "spent": []},
    }
    # Without a level the test is made again.
    signal = RoundMetrics.from_json(loaded).signal
    assert signal is not None
    assert math.isnan(signal.level)
    assert not signal.passed


def test_metrics_of_format_0() -> None:
    old = {"votes": {"choices": 3, "thumbs": 2, "corrections": 1, "train": 4, "judge": 2}, "seconds": {"gate": 1.0}}
    assert METRICS.load(json.dumps(old)) == {**old, "votes": {**old["votes"], "left_out": 0, "quarantined": 0}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "reference"), ({"policy": {}}, "reference"), ({"policy": {"start_from": "active"}}, "active")],
)
def test_where_a_round_started(settings: dict[str, Any], expected: str) -> None:
    assert start_from(settings) == expected


def test_the_store_writes_the_format_and_readers_do_not_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path)
    store.policies.register_reference()
    fence = lease(store)
    round_ = store.rounds.create(0, {"seed": 1}, reference_version="v0000", fence=fence)
    store.rounds.update(round_.id, metrics=RoundMetrics(seconds={"gate": 1.0}), fence=fence)
    [row] = store._db.rows("SELECT settings, metrics FROM rounds")
    assert (json.loads(row["settings"]), json.loads(row["metrics"])) == (
        {"format": 10, "seed": 1},
        {"format": 3, "seconds": {"gate": 1.0}},
    )
    found = store.rounds.get(round_.id)
    assert (found.settings, found.metrics) == ({"seed": 1}, RoundMetrics(seconds={"gate": 1.0}))

    # Metrics of an earlier format, to which a later version adds, are upgraded once.
    def add(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "seconds": {**values.get("seconds", {}), "added": values["seconds"]["gate"] + 10}}

    monkeypatch.setattr(stored_round, "METRICS", Stored((*stored_round.METRICS.upgrades, add)))
    store.rounds.update(round_.id, metrics=RoundMetrics(versions={"torch": "2"}), fence=fence)
    assert store.rounds.get(round_.id).metrics == RoundMetrics(
        versions={"torch": "2"}, seconds={"gate": 1.0, "added": 11.0}
    )
    assert json.loads(store._db.rows("SELECT metrics FROM rounds")[0]["metrics"])["format"] == 4
    store.rounds.update(round_.id, settings={"seed": 2}, fence=fence)
    assert json.loads(store._db.rows("SELECT settings FROM rounds")[0]["settings"]) == {"format": 10, "seed": 2}
    store.close()


def test_the_start_of_earlier_rounds_decides_which_versions_carry_votes(tmp_path: Path) -> None:
    from tests.server.store.test_deletion import trained

    store = Store.open(tmp_path)
    store.policies.register_reference()
    fence = lease(store)
    first = trained(store, fence, "v0001", {}, "reference", "v0000")
    second = trained(store, fence, "v0002", {}, "active", "v0001")
    with store._db.write():
        old = json.dumps({"ppo": {"start_from": "incumbent"}})
        store._db.execute("UPDATE rounds SET settings = ? WHERE id = ?", [old, second])
    assert store.lineage.carriers([first]) == {"v0001": "candidate", "v0002": "candidate"}
    store.close()

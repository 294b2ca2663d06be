"""Rounds that earlier versions began are resumed with the settings that they began with."""

import json
from pathlib import Path
from typing import Any

import pytest

from learner.round.resume import began_with
from learner.settings import LearnerSettings
from server.shared.errors import FailedPreconditionError
from server.shared.stored_round import SETTINGS
from server.shared.tables import flatten
from server.store.learning.records import Round
from server.store.learning.round_metrics import RoundMetrics

# The settings that commit a51ccdf stores for a round with its defaults.
A51CCDF: dict[str, Any] = {
    "service_temperature": 0.85,
    "max_model_len": 2048,
    "kv_cache_gib": 1,
    "gpu_memory_share": 0.3,
    "cpu_threads": "auto",
    "ab_test_user_votes": 10,
    "min_votes": 40,
    "max_votes": 20000,
    "skip_rolled_back": False,
    "max_prompts": 20000,
    "min_prompts": 24,
    "seed": 0,
    "max_resumes": 5,
    "keep_versions": 8,
    "nice": 10,
    "threads": 0,
    "lease_seconds": 30.0,
    "load_timeout_seconds": 120.0,
    "schedule": {
        "cron": "0 3 * * *",
        "interval_minutes": None,
        "on_request": False,
        "min_new_votes": 1,
        "quiet_hours": "",
        "retry_minutes": 5.0,
        "retries": 4,
    },
    "reward": {
        "layers": [],
        "l2_grid": [0.3, 1.0, 3.0, 10.0, 30.0],
        "label_smoothing": 0.05,
        "folds": 5,
        "fold_repeats": 4,
        "signal_votes": 1000,
        "signal_l2": 1.0,
        "signal_folds": 10,
        "signal_repeats": 2,
        "permutations": 199,
        "half_life_days": 90.0,
        "age_floor": 0.1,
        "user_share": 0.05,
        "weigh_voters": True,
        "members": 32,
        "reference_answers": 64,
    },
    "ppo": {
        "train": "lora",
        "start_from": "reference",
        "lora_rank": 16,
        "lora_alpha": 32,
        "dtype": "bfloat16",
        "steps": 12,
        "episodes": 32,
        "epochs": 1,
        "minibatches": 2,
        "micro_batch": 8,
        "learning_rate": 0.0002,
        "critic_learning_rate": 0.001,
        "adam_epsilon": 1e-05,
        "max_grad_norm": 1.0,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "clip_range": 0.2,
        "dual_clip": 3.0,
        "value_clip": 0.2,
        "vf_coef": 0.1,
        "kl_coef": 0.1,
        "kl_target": 3.5,
        "kl_horizon": 160.0,
        "kl_budget": 6.0,
        "approx_kl_stop": 0.02,
        "importance_cap": 2.0,
        "missing_eos_score": None,
        "patience": 4,
        "save_every": 1,
        "checkpoint_every": 1,
        "mismatch_limit": 0.35,
    },
    "gate": {
        "judge_share": 0.4,
        "refits": 500,
        "prompts": 64,
        "answers": 2,
        "candidates": 4,
        "keep_candidates": False,
        "signal_p": 0.02,
        "confidence": 0.9,
        "gap_margin": 0.05,
        "length_range": [0.25, 2.0],
        "empty_margin": 0.05,
        "repetition_margin": 0.15,
    },
}


def begun(stored: dict[str, Any]) -> Round:
    settings = SETTINGS.load(json.dumps(stored))
    nothing = RoundMetrics()
    return Round("round_1", "running", "snapshot", 9, "v0000", "v0000", None, None, settings, nothing, "", 0.0, None)


def test_settings_that_a51ccdf_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # Current settings are for rounds that begin now.
    (tmp_path / "prefloop.toml").write_text("min_votes = 7\n[ppo]\nsteps = 3\n")
    monkeypatch.setenv("PREFLOOP_SEED", "5")
    monkeypatch.setenv("PREFLOOP_LEARNER_GPU_MEMORY_SHARE", "0.9")
    settings = began_with(begun(A51CCDF), {"data_dir": tmp_path})
    assert (settings.dtype, settings.learner_gpu_memory_share) == ("bfloat16", 0.3)
    assert (settings.seed, settings.min_votes, settings.ppo.steps) == (0, 40, 12)
    assert (settings.policy.mismatch_limit, settings.data_dir) == (0.35, tmp_path)
    # It was eight answers at a time then; it is as many tokens now.
    assert settings.policy.micro_batch_tokens == 1024
    # The others are unchanged.
    kept, stored = flatten(settings.model_dump(mode="json")), flatten(A51CCDF)
    del (
        stored["gpu_memory_share"],
        stored["ppo.dtype"],
        stored["ppo.micro_batch"],
        stored["reward.permutations"],
        stored["gate.gap_margin"],
    )
    of_policy = {"train", "start_from", "lora_rank", "lora_alpha", "mismatch_limit", "kl_budget"}
    names = {f"ppo.{name}": f"policy.{name}" for name in of_policy} | {"duel_user_votes": "ab_test_user_votes"}
    assert {name: kept[names.get(name, name)] for name in stored} == stored


def test_a_setting_that_the_round_does_not_know_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLOOP_NICE", "19")
    older = {name: value for name, value in A51CCDF.items() if name != "nice"}
    assert began_with(begun(older), {}).nice == 0


@pytest.mark.parametrize(
    ("stored", "names"),
    [
        ({"format": 1, "ppo": {"steps": 3, "rollouts": 2}, "colour": "red"}, "ppo.rollouts, colour"),
        ({"format": 99, "seed": 1}, "format"),
        ({"ppo": {"steps": -1}}, "ppo.steps"),
    ],
)
def test_settings_of_another_version_are_refused_in_a_sentence(stored: dict[str, Any], names: str) -> None:
    with pytest.raises(FailedPreconditionError) as error:
        began_with(begun(stored), {})
    assert str(error.value) == (
        f"round_1 was started by another version of prefloop with settings that this one cannot use ({names}): "
        "finish it with that version."
    )


def test_current_settings_do_not_affect_an_old_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLOOP_PROT", "1")
    assert LearnerSettings.from_values({"seed": 3}).seed == 3

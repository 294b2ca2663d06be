"""One round: snapshot -> reward model -> PPO -> gate -> publish -> activate.

Each stage ends by one fenced write that names it; `run_once` goes on behind the last stage that was written, so a round
may be killed anywhere. What a stage makes is on disk before it is named: the reward model under `reward_models/`,
candidates and TensorBoard files under `rounds/<id>/`, the version under `policies/`. A round that raises is recorded as
failed and the served policy stays what it was.
"""

import importlib.metadata
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from learner import heads as fitting
from learner import reward_model as scoring
from learner.checkpoint import copy_weights, publish_version, verified, with_tokenizer
from learner.dataset import Dataset, split_prompts, to_dataset
from learner.features import FeatureCache, default_layers
from learner.gate import (
    Figures,
    Health,
    Judge,
    Verdict,
    decide,
    fit_judge,
    health,
    length_matched,
    win_rate,
    wins,
)
from learner.heads import SignalTest
from learner.lease import learner_lease
from learner.ppo import mismatch
from learner.progress import Stages
from learner.reward_model import RewardModel
from learner.rollout import Engine, Sample, set_environment, to_rollout
from learner.settings import LearnerSettings
from learner.training import StepFigures, check_push, judge_rollout, policy_logprobs, train
from server.errors import ConflictError, NotFoundError
from server.manifest import read_manifest
from server.records import Lease, Prompt, Round, Snapshot
from server.store import FeedbackStore

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from learner.policy import Policy

STAGES = ("snapshot", "reward_model", "ppo", "gate", "publish", "activate")
# Fewer on either side cannot be fitted or judged at all.
MIN_SIDE = 10


@dataclass(frozen=True)
class Report:
    """How a call of `run_once` ended: what the closing table shows and `--json` prints."""

    state: Literal["nothing", "promoted", "rejected"]
    sentence: str
    round_id: str | None = None
    policy_version: str | None = None
    reward_model_version: str | None = None
    incumbent_version: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def run_once(settings: LearnerSettings, stages: Stages) -> Report:
    """Runs or resumes one round."""
    if not (settings.data_dir / "prefloop.db").exists():
        return Report("nothing", f"There is no data in {str(settings.data_dir)!r} yet: start `server serve` and vote.")
    store = FeedbackStore.open(settings.data_dir)
    try:
        with learner_lease(store, settings.data_dir, settings.lease_seconds) as lease:
            if lease is None:
                return Report("nothing", "Another learner is at work on this data directory; nothing was done.")
            return _run_or_resume(store, lease, settings, stages)
    finally:
        store.close()


def _run_or_resume(store: FeedbackStore, lease: Lease, settings: LearnerSettings, stages: Stages) -> Report:
    current = store.registry.running_round()
    if current:
        stages.console.print(f"going on with {current.id} after its stage {current.stage}", highlight=False)
        # The settings the round began with, where it is done, when it is resumed.
        started_with = {**current.settings, "data_dir": settings.data_dir}
        settings = LearnerSettings(**started_with)
        snapshot = store.snapshot(current.watermark)
    else:
        snapshot = store.snapshot()
        if reason := why_not(store, snapshot, settings):
            return Report("nothing", reason)
        current = store.registry.create_round(
            snapshot.watermark,
            settings.model_dump(mode="json", exclude={"data_dir"}),
            reference_version=store.registry.active_policy().reference_version,
            fence=lease,
        )
    running = RunningRound(store, lease, settings, stages, current, snapshot)
    try:
        return running.run()
    except Exception as error:
        # The job's boundary: recorded, the served policy untouched, and raised for whoever started it.
        store.registry.finish_round(current.id, "failed", reason=f"{type(error).__name__}: {error}", fence=lease)
        raise
    finally:
        running.close()


def why_not(store: FeedbackStore, snapshot: Snapshot, settings: LearnerSettings) -> str | None:
    """Why no round starts now, in a sentence; None if one may."""
    try:
        store.registry.active_policy()
    except NotFoundError:
        return "There is no policy yet: start `server serve` once, so that it prepares the reference."
    votes = len(snapshot.choices) + len(snapshot.thumbs) + len(snapshot.corrections)
    if votes == 0:
        return "There are no votes yet; nothing was changed."
    last = next((r for r in store.registry.rounds() if r.state in ("promoted", "rejected")), None)
    if last and last.watermark == snapshot.watermark:
        return f"There are no new votes since {last.id} ({last.state}); nothing was changed."
    if votes < settings.min_votes:
        return f"There are {votes} votes, fewer than the {settings.min_votes} a round needs; nothing was changed."
    dataset = to_dataset(snapshot, time.time(), settings.gate.judge_share, settings.reward, lambda text: [0])
    train, held_out = split_prompts(store.prompts(), settings.gate.judge_share, settings.max_model_len)
    for name, side, prompts in (("train on", dataset.train, train), ("judge by", dataset.judge, held_out)):
        if len(side) < MIN_SIDE or len(prompts) < MIN_SIDE:
            return (
                f"There are {len(side)} votes and {len(prompts)} prompts to {name}, and {MIN_SIDE} of each are needed: "
                "gather votes in more conversations. Nothing was changed."
            )
    return None


class RunningRound:
    """One round in progress. Models and the engine are made when a stage first needs them."""

    def __init__(
        self,
        store: FeedbackStore,
        lease: Lease,
        settings: LearnerSettings,
        stages: Stages,
        round_: Round,
        snapshot: Snapshot,
    ) -> None:
        self.store, self.lease, self.settings, self.stages = store, lease, settings, stages
        self.round, self.snapshot = round_, snapshot
        self.directory = settings.data_dir / "rounds" / round_.id
        self.train_prompts, self.held_out_prompts = split_prompts(
            store.prompts(), settings.gate.judge_share, settings.max_model_len
        )

    def run(self) -> Report:
        """The story."""
        set_environment(self.settings)
        self.directory.mkdir(parents=True, exist_ok=True)
        dataset = self.load_feedback()
        features = self.extract_features(dataset)
        signal = self.test_signal(dataset, features)
        if not signal.p_value < self.settings.gate.signal_p:
            return self.finish_without_signal(signal)
        reward_model = self.fit_reward_model(dataset, features)
        self.improve_policy(reward_model)
        if not self.round.metrics["ppo"]["candidates"]:
            return self.finish(
                "rejected", "The first step already went over the KL budget; a lower learning rate may help."
            )
        verdict = self.judge_candidates(dataset, features, reward_model, signal)
        version = self.publish(verdict)
        return self.activate(version, verdict)

    # Stages

    def load_feedback(self) -> Dataset:
        dataset = to_dataset(
            self.snapshot, self.round.create_time, self.settings.gate.judge_share, self.settings.reward, self._encode
        )
        if not self.done("reward_model"):
            votes = {
                "choices": len(self.snapshot.choices),
                "thumbs": len(self.snapshot.thumbs),
                "corrections": len(self.snapshot.corrections),
                "train": len(dataset.train),
                "judge": len(dataset.judge),
            }
            self.record("snapshot", {"votes": votes})
        return dataset

    def extract_features(self, dataset: Dataset) -> Tensor:
        """(N, F) of every voted answer, from the cache or the reference."""
        cache = FeatureCache.open(self.settings.data_dir / "cache", self._reference_sha256, self.layers)
        with (
            self.policy.reference() as reference,
            self.stages.stage("features", "reading the voted answers", len(dataset.answers)) as advance,
        ):
            return cache.get(dataset.answers, reference, self.layers, self.settings.ppo.micro_batch, advance)

    def test_signal(self, dataset: Dataset, features: Tensor) -> SignalTest:
        if "signal" in self.round.metrics:
            return SignalTest(**self.round.metrics["signal"])
        reward = self.settings.reward
        voted = torch.cat([dataset.votes.a, dataset.votes.b, dataset.votes.response]).unique()
        standard = scoring.standardiser(features[voted], len(self.layers))(features)
        with self.stages.stage("signal", "testing the votes for a signal"):
            signal = fitting.signal_test(
                standard @ fitting.span_basis(standard[voted]),
                dataset.votes,
                reward.signal_l2,
                reward.label_smoothing,
                min(reward.signal_folds, dataset.votes.groups),
                reward.signal_repeats,
                reward.permutations,
                self.generator(1),
            )
        self.record("snapshot", {"signal": asdict(signal)})
        return signal

    def fit_reward_model(self, dataset: Dataset, features: Tensor) -> RewardModel:
        if self.done("reward_model"):
            directory, _ = verified(self._reward_model_directory)
            return RewardModel.load(directory)
        with self.stages.stage("reward_model", "fitting the reward model"):
            model = scoring.fit_reward_model(
                features, dataset.train, self.layers, self.settings.reward, self.generator(2)
            )
            held_out = scoring.evaluate(model, features, dataset.judge)
        # The reference's own answers at the service temperature give the score its zero and its unit.
        prompts = _spread(self.train_prompts, self.settings.reward.reference_answers)
        with self.stages.stage("reward_model", "scoring reference answers"):
            self.engine.push(self.policy.reference_weights())
            samples = self.engine.sample(prompts, self.settings.seed)
        model = scoring.standardise(model, self.features_of(samples, model))
        version = self.round.reward_model_version or self._free_version("reward_models", "rm")
        self.update(reward_model_version=version)
        publish_version(
            self._reward_model_directory,
            model.save,
            kind="full",
            reference_version=self.round.reference_version,
            info={"round_id": self.round.id},
        )
        metrics = {**asdict(held_out), "l2": model.l2, "score_low": model.low, "score_high": model.high}
        self.store.registry.register_reward_model(
            version,
            reference_version=self.round.reference_version,
            round_id=self.round.id,
            metrics=metrics,
            fence=self.lease,
        )
        self.record("reward_model", {"reward_model": metrics})
        return RewardModel.load(self._reward_model_directory)

    def improve_policy(self, reward_model: RewardModel) -> None:
        if self.done("ppo"):
            return
        ppo = self.settings.ppo
        for stale in self.directory.glob("step-*"):
            shutil.rmtree(stale)
        if ppo.start_from == "incumbent" and self.round.incumbent_version != self.round.reference_version:
            directory, _ = verified(self._policy_directory(self.round.incumbent_version))
            self.policy.load(directory)
        figures: list[StepFigures] = []
        with (
            self.stages.stage("ppo", "improving the policy (PPO)", ppo.steps) as advance,
            self._tensorboard() as writer,
        ):

            def on_step(step: StepFigures) -> None:
                figures.append(step)
                for name, value in asdict(step).items():
                    writer.add_scalar(f"ppo/{name}", value, step.step)
                advance(1)

            candidates = train(
                self.policy,
                reward_model,
                self.engine,
                self.train_prompts,
                self.directory,
                ppo,
                self.settings.service_temperature,
                self.settings.seed,
                on_step,
            )
        self.record(
            "ppo",
            {"ppo": {"steps": [asdict(step) for step in figures], "candidates": [c.step for c in candidates]}},
        )

    def judge_candidates(
        self, dataset: Dataset, features: Tensor, reward_model: RewardModel, signal: SignalTest
    ) -> Verdict:
        if self.done("gate"):
            return _verdict(self.round.metrics["gate"])
        gate, prompts = self.settings.gate, _spread(self.held_out_prompts, self.settings.gate.prompts)
        prompts = prompts * gate.answers
        judge = fit_judge(
            features,
            dataset.judge,
            reward_model.standardiser,
            reward_model.l2,
            self.settings.reward.label_smoothing,
            gate.refits,
            self.generator(3),
        )
        steps = self._promising(self.round.metrics["ppo"]["candidates"])
        roles = {"reference": self.round.reference_version, "incumbent": self.round.incumbent_version}
        with self.stages.stage("gate", "judging candidates", len(steps) + len(set(roles.values()))) as advance:
            # In the first round both roles are the same version: its answers are sampled and read once.
            sampled: dict[str, tuple[list[Sample], Tensor]] = {}
            for version in dict.fromkeys(roles.values()):
                samples = self._published_answers(version, prompts)
                sampled[version] = samples, self.features_of(samples, reward_model)
                advance(1)
            answers = {role: sampled[version][0] for role, version in roles.items()}
            opponents = {role: sampled[version][1] for role, version in roles.items()}
            figures = []
            for step in steps:
                samples = answers[f"step {step}"] = self._candidate_answers(step, prompts)
                figures.append(self._measure(step, samples, opponents, judge, reward_model))
                advance(1)
        incumbent = health(answers["incumbent"])
        verdict = decide(figures, signal, incumbent, self.settings.ppo.kl_budget, gate)
        self._keep_answers(prompts, answers)
        self._log_gate(verdict)
        everything = {
            "chosen": asdict(verdict.chosen),
            "reasons": verdict.reasons,
            "candidates": [asdict(f) for f in figures],
            "incumbent_health": asdict(incumbent),
        }
        self.record("gate", {"gate": everything})
        return verdict

    def publish(self, verdict: Verdict) -> str:
        if self.done("publish") and self.round.policy_version:
            return self.round.policy_version
        version = self.round.policy_version or self._free_version("policies", "v")
        self.update(policy_version=version)
        kind: Literal["adapter", "full"] = "adapter" if self.settings.ppo.train == "lora" else "full"
        fill = copy_weights(self.directory / f"step-{verdict.chosen.step:03d}")
        with self.stages.stage("publish", f"publishing {version}"):
            publish_version(
                self._policy_directory(version),
                fill if kind == "adapter" else with_tokenizer(fill, self.reference_directory),
                kind=kind,
                reference_version=self.round.reference_version,
                info={
                    "round_id": self.round.id,
                    "step": verdict.chosen.step,
                    "settings": self.round.settings,
                    "packages": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
                },
            )
        self.store.registry.register_policy(
            version,
            kind=kind,
            state="candidate" if verdict.promoted else "rejected",
            parent_version=self.round.incumbent_version,
            reference_version=self.round.reference_version,
            round_id=self.round.id,
            reward_model_version=self.round.reward_model_version,
            metrics=asdict(verdict.chosen),
            reason=" ".join(verdict.reasons),
            fence=self.lease,
        )
        self.record("publish", {})
        for candidate in self.directory.glob("step-*"):
            shutil.rmtree(candidate)
        return version

    def activate(self, version: str, verdict: Verdict) -> Report:
        if not verdict.promoted:
            return self.finish("rejected", f"{version} was not promoted: {' '.join(verdict.reasons)}")
        incumbent = self.round.incumbent_version
        try:
            if self.store.registry.active_policy().version != version:
                self.store.registry.activate_policy(
                    version,
                    actor="learner",
                    reason=f"round {self.round.id}",
                    expected_active_version=incumbent,
                    fence=self.lease,
                )
        except ConflictError as error:
            return self.finish(
                "rejected", f"{version} was not activated, since the policy was changed meanwhile: {error}"
            )
        with self.stages.stage("activate", f"waiting for servers to load {version}"):
            loaded = wait_until_loaded(self.store, version, self.settings.load_timeout_seconds)
        # A server that could not load the version has given the pointer back.
        if self.store.registry.active_policy().version != version:
            return self.finish("rejected", f"{version} was activated and taken back: {loaded}")
        return self.finish("promoted", f"{version} is active in place of {incumbent}; {loaded}")

    def finish_without_signal(self, signal: SignalTest) -> Report:
        return self.finish(
            "rejected",
            f"The votes carry too little signal to learn from: cross-validated accuracy {signal.accuracy:.2f}, where "
            f"shuffled votes give {signal.null_accuracy:.2f} (p = {signal.p_value:.3f}). More votes may help; "
            "nothing was changed.",
        )

    def finish(self, state: Literal["promoted", "rejected"], sentence: str) -> Report:
        self.record("activate" if state == "promoted" else self.round.stage, {})
        self.round = self.store.registry.finish_round(self.round.id, state, reason=sentence, fence=self.lease)
        report = Report(
            state,
            sentence,
            self.round.id,
            self.round.policy_version,
            self.round.reward_model_version,
            self.round.incumbent_version,
            self.round.metrics,
        )
        (self.directory / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        return report

    # What stages share

    def done(self, stage: str) -> bool:
        return STAGES.index(self.round.stage) >= STAGES.index(stage)

    def record(self, stage: str, metrics: dict[str, Any]) -> None:
        """Names the stage as finished, with its figures and the seconds so far."""
        before = self.round.metrics.get("seconds", {})
        seconds = {**before, **{name: round(value, 2) for name, value in self.stages.seconds.items()}}
        self.update(stage=stage, metrics=_json_safe({**metrics, "seconds": seconds}))

    def update(self, **changes: Any) -> None:
        self.round = self.store.registry.update_round(self.round.id, fence=self.lease, **changes)

    def generator(self, stream: int) -> torch.Generator:
        """Random draws of one purpose, the same when a round is resumed."""
        return torch.Generator().manual_seed(self.settings.seed * 1_000 + stream)

    @cached_property
    def reference_directory(self) -> Path:
        directory, manifest = verified(self._policy_directory(self.round.reference_version))
        if manifest.kind != "full":
            raise ValueError(f"The reference {directory.name} is an adapter; a reference holds all weights.")
        return directory

    @property
    def _reference_sha256(self) -> str:
        return json.dumps(read_manifest(self.reference_directory).files, sort_keys=True)

    @cached_property
    def policy(self) -> "Policy":
        with self.stages.stage("start", "loading the reference"):
            from learner.policy import Policy

            return Policy.create(self.reference_directory, self.settings.ppo, torch.device("cpu"))

    @cached_property
    def engine(self) -> Engine:
        with self.stages.stage("start", "starting the engine"):
            longest = max(len(p.token_ids) + p.max_tokens for p in self.train_prompts + self.held_out_prompts)
            return Engine(self.reference_directory, self.settings, longest + 1)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return self.settings.reward.layers or default_layers(self.policy.model.config.num_hidden_layers)

    def features_of(self, samples: list[Sample], model: RewardModel) -> Tensor:
        rollout = to_rollout(samples)
        return judge_rollout(
            self.policy, model, rollout, self.settings.service_temperature, self.settings.ppo.micro_batch
        ).features

    def close(self) -> None:
        if "engine" in self.__dict__:
            self.engine.close()

    def _candidate_answers(self, step: int, prompts: list[Prompt]) -> list[Sample]:
        """The policy keeps the candidate's weights, so that its log-probabilities can be taken."""
        self.policy.load(self.directory / f"step-{step:03d}")
        self.engine.push(self.policy.engine_weights())
        return self.engine.sample(prompts, self.settings.seed + 7)

    def _published_answers(self, version: str, prompts: list[Prompt]) -> list[Sample]:
        from learner.policy import published_weights

        directory, manifest = verified(self._policy_directory(version))
        base = self._policy_directory(manifest.base_version) if manifest.kind == "adapter" else None
        self.engine.push(published_weights(directory, base))
        return self.engine.sample(prompts, self.settings.seed + 7)

    def _measure(
        self, step: int, samples: list[Sample], opponents: dict[str, Tensor], judge: Judge, reward_model: RewardModel
    ) -> Figures:
        rollout, ppo = to_rollout(samples), self.settings.ppo
        temperature, size = self.settings.service_temperature, ppo.micro_batch
        judged = judge_rollout(self.policy, reward_model, rollout, temperature, size)
        # The served policy is the trained one: some answers are enough to see it.
        some = torch.arange(min(2 * size, len(rollout.tokens)))
        part = rollout.tokens[some]
        logprobs = policy_logprobs(self.policy, part, temperature, size)
        sampled_with = rollout.behavior_logprobs[some, : logprobs.shape[1]]
        check_push(mismatch(logprobs, sampled_with, part.response_mask), ppo.mismatch_limit)
        ours, incumbent = judged.features, opponents["incumbent"]
        confidence, generator = self.settings.gate.confidence, self.generator(4)
        prompts = len(samples) // self.settings.gate.answers
        matched_rate, matched_answers = length_matched(judge, ours, incumbent)
        return Figures(
            step=step,
            kl=float((rollout.behavior_logprobs - judged.ref_logprobs).sum(dim=1).mean()),
            against_incumbent=win_rate(judge, ours, incumbent, prompts, confidence, generator),
            against_reference=win_rate(judge, ours, opponents["reference"], prompts, confidence, generator),
            trained_rate=float(wins(reward_model.scores(ours) - reward_model.scores(incumbent)).mean()),
            matched_rate=matched_rate,
            matched_answers=matched_answers,
            health=health(samples),
        )

    def _promising(self, steps: list[int]) -> list[int]:
        """The latest candidates, spread over training."""
        count = min(self.settings.gate.candidates, len(steps))
        return [steps[len(steps) - 1 - i * len(steps) // count] for i in reversed(range(count))]

    def _keep_answers(self, prompts: list[Prompt], answers: dict[str, list[Sample]]) -> None:
        """Every answer that was judged, side by side, for whoever wants to read what changed."""
        with (self.directory / "answers.jsonl").open("w") as file:
            for row, prompt in enumerate(prompts):
                line = {name: asdict(samples[row]) for name, samples in answers.items()}
                for answer in line.values():
                    del answer["prompt"], answer["logprobs"]
                json.dump({"prompt_token_ids": prompt.token_ids, **line}, file, ensure_ascii=False)
                file.write("\n")

    def _log_gate(self, verdict: Verdict) -> None:
        with self._tensorboard() as writer:
            chosen = verdict.chosen
            writer.add_scalar("gate/win_rate", chosen.against_incumbent.rate, chosen.step)
            writer.add_scalar("gate/win_rate_low", chosen.against_incumbent.low, chosen.step)
            writer.add_scalar("gate/kl", chosen.kl, chosen.step)
            writer.add_scalar("gate/length", chosen.health.length, chosen.step)

    @contextmanager
    def _tensorboard(self) -> Iterator["SummaryWriter"]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.directory))
        try:
            yield writer
        finally:
            writer.close()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.reference_directory)

    def _encode(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(text, add_special_tokens=False), self._tokenizer.eos_token_id]

    def _policy_directory(self, version: str) -> Path:
        return self.settings.data_dir / "policies" / version

    @property
    def _reward_model_directory(self) -> Path:
        return self.settings.data_dir / "reward_models" / str(self.round.reward_model_version)

    def _free_version(self, folder: str, prefix: str) -> str:
        """The version after the highest that is registered or on disk."""
        registered = (
            [p.version for p in self.store.registry.policies()]
            if folder == "policies"
            else [m.version for m in self.store.registry.reward_models()]
        )
        on_disk = [p.name for p in (self.settings.data_dir / folder).glob(f"{prefix}[0-9]*")]
        taken = [int(name.removeprefix(prefix)) for name in (*registered, *on_disk)]
        return f"{prefix}{max(taken, default=0) + 1:04d}"


def wait_until_loaded(store: FeedbackStore, version: str, timeout: float) -> str:
    """What live servers say of `version`, in a clause; returns at once where none is live."""
    deadline = time.monotonic() + timeout
    while True:
        replicas = store.registry.replicas()
        if not replicas:
            return "no server is running, the next one to start will load it."
        if all(r.loaded_version == version for r in replicas):
            return f"{len(replicas)} running server{'s' * (len(replicas) > 1)} loaded it."
        if failed := [r for r in replicas if r.error]:
            return f"a server could not load it and went on with {failed[0].loaded_version}: {failed[0].error}"
        if time.monotonic() > deadline:
            waiting = sum(r.loaded_version != version for r in replicas)
            return f"{waiting} of {len(replicas)} running servers had not loaded it after {timeout:.0f} s."
        time.sleep(0.2)


def _json_safe(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have: a figure that could not be taken."""
    if isinstance(value, dict):
        return {name: _json_safe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """At most `count` prompts, evenly over the list."""
    n = min(count, len(prompts))
    return [prompts[i * len(prompts) // n] for i in range(n)]


def _verdict(stored: dict[str, Any]) -> Verdict:
    from learner.gate import WinRate

    chosen = dict(stored["chosen"])
    figures = Figures(
        **{
            **chosen,
            "against_incumbent": WinRate(**chosen["against_incumbent"]),
            "against_reference": WinRate(**chosen["against_reference"]),
            "health": Health(**chosen["health"]),
        }
    )
    return Verdict(figures, stored["reasons"])

"""What the stages of a round share: its record in the store, its directories, its models and its engine."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learner.gate.checks import Check, CheckError, read_checks
from learner.improve.budget import Budget
from learner.improve.candidates import drop_candidates
from learner.improve.state import drop_states
from learner.model.device import resolve_device
from learner.model.features import FeatureSpec, extract, feature_spec
from learner.model.forward import Tokens, to_tokens
from learner.model.policy import TrainablePolicy
from learner.model.rollout import RolloutEngine, SampledAnswer, draw_generator, to_rollout
from learner.process import return_freed_memory
from learner.progress import Stages
from learner.reward.linear_reward_model import LinearRewardModel
from learner.round.prompts import ANSWER_TOKENS, Prompts, share_out, split_prompts, top_up
from learner.round.token_ids import TokenIds
from learner.settings import LearnerSettings
from server.shared.model.context import context_length
from server.shared.model.dtype import DtypeName, torch_dtype
from server.shared.model.prompt import with_system
from server.shared.model.text import ChatText, UnknownTokenError
from server.store.chats.records import Prompt, Snapshot
from server.store.files.manifest import read_manifest, verify
from server.store.learning.records import Lease, Round
from server.store.learning.round_metrics import RoundMetrics
from server.store.store import Store

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Room for a prompt that people are asked to compare answers to.
POOL_TOKENS = 128
STAGES = ("snapshot", "reward_model", "improve", "gate", "publish", "activate")


class Workspace:
    """One round in progress. Models and the engine are created when a stage first needs them."""

    def __init__(
        self,
        store: Store,
        lease: Lease,
        settings: LearnerSettings,
        stages: Stages,
        round_: Round,
        snapshot: Snapshot,
    ) -> None:
        assert settings.dtype != "auto", "a round's dtype is resolved before it begins"
        self.dtype: DtypeName = settings.dtype
        """The dtype of the engine and the trainer."""
        self.settings = settings.model_copy(update={"policy": settings.policy.at(self.dtype)})
        self.store, self.lease, self.stages = store, lease, stages
        self.round, self._taken = round_, snapshot
        self.directory = settings.data_dir / "rounds" / round_.id
        # As of when the round began, even if newer prompts exist when it is resumed.
        self._asked = store.snapshots.prompts(round_.create_time, settings.max_prompts, round_.quarantined)

    def done(self, stage: str) -> bool:
        return STAGES.index(self.round.stage) >= STAGES.index(stage)

    def record(self, stage: str, metrics: RoundMetrics | None = None) -> None:
        """Records the stage as finished, with its metrics and the seconds so far."""
        now = {name: round(value, 2) for name, value in self.stages.seconds.items()}
        timed = RoundMetrics(seconds={**self.round.metrics.seconds, **now})
        self.update(stage=stage, metrics=(metrics or RoundMetrics()) | timed)

    def update(self, **changes: Any) -> None:
        self.round = self.store.rounds.update(self.round.id, fence=self.lease, **changes)

    def generator(self, stream: int) -> torch.Generator:
        """The random generator for one purpose. A resumed round gets the same draws."""
        return draw_generator(self.settings.seed, stream)

    @cached_property
    def reference_directory(self) -> Path:
        directory = self.policy_directory(self.round.reference_version)
        manifest = verify(directory)
        if manifest.kind != "full":
            raise ValueError(f"The reference {directory.name} is an adapter; a reference must have all weights.")
        return directory

    @property
    def reference_sha256(self) -> str:
        return cache_key(self.reference_directory)

    @cached_property
    def policy(self) -> TrainablePolicy:
        with self.stages.stage("start", "loading the reference"):
            return TrainablePolicy.create(
                self.reference_directory,
                self.settings.policy,
                torch_dtype(self.dtype),
                resolve_device(self.settings.learner_device),
                self.settings.seed,
                self.settings.trust_remote_code,
            )

    @cached_property
    def budget(self) -> Budget:
        """How far this round may go from the reference. The incumbent's KL is as its gate measured it; a version that
        none judged has none, nor has the reference, whose gate measured from another one."""
        incumbent = self.store.policies.get(self.round.incumbent_version)
        measured = incumbent.metrics.get("kl") or 0.0
        return Budget.after(
            0.0 if incumbent.version == self.round.reference_version else measured, self.settings.policy
        )

    @cached_property
    def engine(self) -> RolloutEngine:
        with self.stages.stage("start", "starting the engine"):
            return RolloutEngine(self.reference_directory, self.settings, self.dtype, self.longest_rollout)

    @cached_property
    def longest_rollout(self) -> int:
        """Tokens of the longest prompt of the round with its answer, and of a prompt of the pool: what the engine has
        room for."""
        prompts = self.prompts.train + self.prompts.held_out
        asked = max(len(p.token_ids) + p.max_tokens for p in prompts + [prompt for _, prompt in self.checks])
        # A prompt of the pool comes after the service's system prompt.
        of_pool = POOL_TOKENS + len(self.text.answer(self.settings.system_prompt, ended=False))
        return min(self.longest, max(asked, of_pool + max(p.max_tokens for p in prompts)))

    @cached_property
    def checks(self) -> list[tuple[Check, Prompt]]:
        """The operator's checks with their prompts, whose answers have the usual length. Raises CheckError for a prompt
        that leaves no room for one."""
        if not self.settings.checks.file:
            return []
        lengths = [p.max_tokens for p in self.prompts.held_out if p.conversation_id]
        usual, found = median_low(lengths) if lengths else ANSWER_TOKENS, []
        for check in read_checks(self.settings.checks.file):
            token_ids = self.encode_chat(check.conversation)
            if not (room := min(usual, self.longest - len(token_ids))) > 0:
                raise CheckError(f"The check {check.name!r} is too long for this model.")
            found.append((check, Prompt("", token_ids, room)))
        return found

    def push(self, version: str) -> None:
        """Gives the engine a published version's weights."""
        from learner.model.policy import published_weights

        directory = self.policy_directory(version)
        manifest = verify(directory)
        base = self.policy_directory(manifest.base_version) if manifest.kind == "adapter" else None
        self.engine.push(published_weights(directory, base, self.policy.model.dtype, self.settings.trust_remote_code))

    @cached_property
    def spec(self) -> FeatureSpec:
        """What features are made of. An earlier version may have fitted the round's reward model: it knows its own."""
        if self.done("reward_model") and self.round.reward_model_version:
            return LinearRewardModel.load(self.reward_model_directory).spec
        return feature_spec(self.policy.model, self.text, self.settings.reward.layers)

    def features_of(self, samples: list[SampledAnswer], spec: FeatureSpec) -> Tensor:
        """Features (N, F) of sampled answers."""
        return self._extract(to_rollout(samples).tokens, spec)

    def prompt_states(self, prompts: list[Prompt], spec: FeatureSpec) -> Tensor:
        """States (N, F - 1) of each prompt's last token: as the only token of a response, it is its own mean."""
        tokens = to_tokens([p.token_ids[:-1] for p in prompts], [p.token_ids[-1:] for p in prompts])
        return self._extract(tokens, spec)[:, :-1]

    def _extract(self, tokens: Tokens, spec: FeatureSpec) -> Tensor:
        with self.policy.reference() as reference:
            return extract(reference, tokens, spec, self.settings.policy.micro_batch_tokens, lambda n: None)

    def clean(self) -> None:
        """Deletes what only a running round needs: the state to resume from, and candidates that are not to be kept."""
        drop_states(self.directory)
        if not self.settings.gate.keep_candidates:
            drop_candidates(self.directory, after=0)

    def close(self) -> None:
        if "engine" in self.__dict__:
            self.engine.close()

    def release(self) -> None:
        """Frees the policy and the engine. Each is made again when it is needed, the policy as the reference."""
        self.close()
        for name in ("engine", "policy"):
            self.__dict__.pop(name, None)
        gc.collect()
        return_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def tensorboard(self) -> Iterator["SummaryWriter"]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.directory))
        try:
            yield writer
        finally:
            writer.close()

    @cached_property
    def snapshot(self) -> Snapshot:
        """The votes that the round learns from, in its reference's token ids."""
        return self._token_ids.snapshot(self._taken)

    @cached_property
    def _token_ids(self) -> TokenIds:
        return TokenIds(self.store, self.round.reference_version, self.settings)

    @cached_property
    def prompts(self) -> Prompts:
        """Prompts to train on and prompts held out: what users asked, topped up if that is too little."""
        settings = self.settings
        asked = share_out(self._token_ids.prompts(self._asked), settings.reward.user_share)
        split = split_prompts(asked, settings.gate.judge_share, self.longest, self.text.embeddings)
        return top_up(split, settings.min_prompts, settings.gate.judge_share, self.longest, self.encode_chat)

    @cached_property
    def longest(self) -> int:
        """Maximum tokens of a prompt and its answer together: the setting, or the model's positions if fewer."""
        settings = self.settings
        return context_length(self.reference_directory, settings.max_model_len, settings.trust_remote_code)

    @cached_property
    def text(self) -> ChatText:
        return ChatText.load(self.reference_directory, self.settings.trust_remote_code)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the chat template, up to its next answer, as if it began with the round: after
        the service's system prompt, unless it has one."""
        return self.text.prompt(with_system(messages, self.settings.system_prompt), self.round.create_time)

    @cached_property
    def _template_ends(self) -> tuple[list[int], list[int]]:
        """What the template puts before and after a single message, whatever the message is; nothing if the model
        lacks a token of the messages that show it."""
        try:
            one, other = (self.encode_chat([{"role": "user", "content": text}]) for text in ("Why?", "No."))
        except UnknownTokenError:
            return [], []
        head = shared(one, other)
        tail = shared(one[head:][::-1], other[head:][::-1])
        return one[:head], one[len(one) - tail :]

    def decode(self, token_ids: list[int]) -> str:
        """A prompt as readable text, without what the chat template puts before and after a first message."""
        head, tail = self._template_ends
        more = len(head) + len(tail) < len(token_ids)
        if more and token_ids[: len(head)] == head and token_ids[len(token_ids) - len(tail) :] == tail:
            token_ids = token_ids[len(head) : len(token_ids) - len(tail)]
        return self.text.text(token_ids).strip()

    def policy_directory(self, version: str) -> Path:
        return self.settings.data_dir / "policies" / version

    @property
    def reward_model_directory(self) -> Path:
        return self.settings.data_dir / "reward_models" / str(self.round.reward_model_version)

    def free_version(self, folder: str, prefix: str) -> str:
        """The next version after the highest one registered or on disk."""
        return free_version(self.store, self.settings.data_dir, folder, prefix)


def free_version(store: Store, data_dir: Path, folder: str, prefix: str) -> str:
    """See `Workspace.free_version`. A stopped round has its version, even if it has not published it."""
    registered = (
        [p.version for p in store.policies.page()]
        if folder == "policies"
        else [m.version for m in store.reward_models.all()]
    )
    on_disk = [p.name for p in (data_dir / folder).glob(f"{prefix}[0-9]*")]
    stopped = store.rounds.running()
    reserved = [stopped.policy_version] if folder == "policies" and stopped and stopped.policy_version else []
    shared_ones = store.shared_versions.versions("policies" if folder == "policies" else "reward_models")
    taken = [int(name.removeprefix(prefix)) for name in (*registered, *on_disk, *reserved, *shared_ones)]
    return f"{prefix}{max(taken, default=0) + 1:04d}"


def cache_key(reference_directory: Path) -> str:
    """The cache key of features computed with this reference: its files' checksums."""
    return json.dumps(read_manifest(reference_directory).files, sort_keys=True)


def shared(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """At most `count` prompts, evenly spaced over the list."""
    n = min(count, len(prompts))
    return [prompts[i * len(prompts) // n] for i in range(n)]

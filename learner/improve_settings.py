"""How the policy is improved."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from learner.number_types import Positive, Share
from server.shared.model.dtype import MICRO_BATCH_TOKENS, DtypeName


class PolicySettings(BaseModel):
    """The policy in training, for any improver."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: Literal["lora", "full"] = Field("lora", description="Train adapters on the reference, or all weights.")
    start_from: Literal["reference", "active"] = Field(
        "reference", description="Where a round starts; from the reference, no drift carries over between rounds."
    )
    lora_rank: int = Field(16, ge=1, description="Rank of the adapters, on every linear layer.")
    lora_alpha: int = Field(32, ge=1, description="Adapters are scaled by this divided by their rank.")
    micro_batch_tokens: int = Field(
        0,
        ge=0,
        description="Tokens in one forward pass, including padding; affects only speed and memory. "
        "0: 2048 in bfloat16, 1024 in float32.",
    )
    checkpoint_activations: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compute activations again in the backward pass instead of keeping them: an update takes less "
        "memory and more time. `auto`: if a round would not fit into the free memory otherwise.",
    )
    mismatch_limit: Positive | None = Field(
        None,
        description="Root mean square of log pi_old / mu taken as proof that the engine has other weights. "
        "Default: 0.35 in bfloat16, 0.005 in float32.",
    )
    kl_budget: Positive = Field(
        6.0,
        description="Sequence KL in nats at which a round stops training. It may go further by the KL of the version "
        "that serves, as measured by that version's gate.",
    )
    kl_total: Positive = Field(
        12.0, description="Sequence KL in nats up to which the budget so moves; it never does if this is not larger."
    )
    kl_per_token: Positive = Field(
        0.5,
        description="KL in nats per token at which a round stops training, too: the lower bound if answers are short.",
    )

    def at(self, dtype: DtypeName) -> "PolicySettings":
        """A copy with defaults that depend on the dtype filled in."""
        tokens = self.micro_batch_tokens or MICRO_BATCH_TOKENS[dtype]
        return self.model_copy(update={"micro_batch_tokens": tokens})


class TrainingSettings(BaseModel):
    """What every improver has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(12, ge=1, le=900, description="Maximum number of rollout batches.")
    episodes: int = Field(32, ge=2, description="Responses in a rollout batch.")
    learning_rate: Positive = Field(2e-4, description="Adam's learning rate for the policy.")
    full_step_tokens: Positive = Field(
        64.0,
        description="Mean length of answers up to which updates take the whole learning rate. Of longer ones an update "
        "may have the same sequence KL, so its learning rate is lower by the root of their ratio.",
    )
    adam_epsilon: Positive = Field(1e-5, description="Adam's epsilon.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this norm.")
    patience: int = Field(
        4,
        ge=1,
        description="Training stops after this many steps without a new best of score minus uncertainty.",
    )
    save_every: int = Field(1, ge=1, description="Steps between candidates.")
    checkpoint_every: int = Field(1, ge=1, description="Steps between states that a killed round resumes from.")

    def at_length(self, length: float) -> Self:
        """A copy for answers of this mean length, in tokens. A step's KL per token grows as the square of the learning
        rate, so that of a whole answer stays the same (docs/decisions/0045)."""
        return self.model_copy(update={"learning_rate": self.learning_rate * self._share(length) ** 0.5})

    def _share(self, length: float) -> float:
        """How much of the KL per token of an update on short answers one on these may have."""
        return min(1.0, self.full_step_tokens / length)


class PolicyGradientSettings(TrainingSettings):
    """What improvers have that train on their rollouts."""

    epochs: int = Field(1, ge=1, description="Passes over each rollout batch.")
    minibatches: int = Field(2, ge=1, description="Optimiser steps in each pass.")
    clip_range: Positive = Field(0.2, description="Clip range of the ratio.")
    dual_clip: float = Field(3.0, gt=1, description="Bound on the loss of bad tokens that became more likely.")
    kl_coef: float = Field(0.1, ge=0, description="Initial weight of the KL penalty.")
    kl_target: Positive = Field(
        3.5, description="Sequence KL in nats that the penalty is adapted to reach; moves as the budget does."
    )
    kl_horizon: Positive = Field(160.0, description="Episodes over which the penalty is adapted.")
    approx_kl_stop: Positive = Field(
        0.02,
        description="KL per token from the rollout's policy that stops an update; lower by the ratio to "
        "full_step_tokens if answers are longer.",
    )
    importance_cap: Positive = Field(2.0, description="Cap of the trainer / engine importance weights.")
    missing_eos_score: float | None = Field(
        None, description="Replaces the score of an answer without EOS; off by default."
    )

    def at_length(self, length: float) -> Self:
        """See `TrainingSettings.at_length`."""
        stop = self.approx_kl_stop * self._share(length)
        return super().at_length(length).model_copy(update={"approx_kl_stop": stop})

    @model_validator(mode="after")
    def _whole_minibatches(self) -> Self:
        if self.minibatches > self.episodes:
            raise ValueError("minibatches cannot be more than episodes")
        return self


class PPOSettings(PolicyGradientSettings):
    """Proximal policy optimisation."""

    critic_learning_rate: Positive = Field(1e-3, description="Adam's learning rate for the value head.")
    gamma: Share = Field(1.0, description="Discount per token.")
    gae_lambda: Share = Field(0.95, description="Trades bias against variance in the advantages.")
    value_clip: Positive = Field(0.2, description="Clip range of the values.")
    vf_coef: Positive = Field(0.1, description="Weight of the value loss.")


class RLOOSettings(PolicyGradientSettings):
    """REINFORCE with a leave-one-out baseline."""

    answers: int = Field(4, ge=2, description="Responses to each prompt of a batch, compared with each other.")

    @model_validator(mode="after")
    def _whole_prompts(self) -> Self:
        if self.episodes % self.answers:
            raise ValueError("episodes must be a multiple of answers")
        return self


class DPOSettings(TrainingSettings):
    """Direct preference optimisation, on the votes themselves. A rollout batch only measures the policy."""

    beta: Positive = Field(0.1, description="Nats of preference in each nat of log pi / pi_ref; lower goes further.")
    votes: int = Field(32, ge=1, description="Votes in each step.")
    minibatches: int = Field(2, ge=1, description="Optimiser steps in each step.")
    length_normalised: bool = Field(
        False, description="Take log pi / pi_ref per token, times the mean length of the voted answers."
    )

    @model_validator(mode="after")
    def _whole_minibatches(self) -> Self:
        if self.minibatches > self.votes:
            raise ValueError("minibatches cannot be more than votes")
        return self


class SFTSettings(BaseModel):
    """Supervised fine-tuning on demonstrations and corrections."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_new: int = Field(
        20,
        ge=0,
        description="So many new demonstrations and corrections let `learner run-once` learn from them first; 0: only "
        "`learner sft` does.",
    )
    epochs: int = Field(10, ge=1, le=900, description="Maximum number of passes over the examples.")
    batch: int = Field(8, ge=1, description="Examples in each optimiser step.")
    learning_rate: Positive = Field(2e-4, description="Adam's learning rate.")
    adam_epsilon: Positive = Field(1e-5, description="Adam's epsilon.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this norm.")
    patience: int = Field(
        2, ge=1, description="Training stops after this many passes without a lower loss on the examples held out."
    )
    held_out_share: Share = Field(0.2, description="Share of the questions that are held out; at least two are.")
    conversation_share: Share = Field(
        0.1, description="Largest share of the tokens that one conversation's corrections have, or twice an equal one."
    )

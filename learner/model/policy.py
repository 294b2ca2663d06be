"""The policy in training, its frozen reference, and the weights to push to an engine.

LoRA: adapters on the reference, so turning the adapters off gives the reference; the base must therefore be the
reference itself. Full: two copies. Trainable parameters in bfloat16 are stepped through float32 masters
(`learner.improve.adam.Adam`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.initialization import meta_device_safe_creation_ops

from learner.improve_settings import PolicySettings
from learner.model.checkpointing import checkpoint_layers
from learner.model.sharding import Pass, shard
from learner.model.worker_group import ALONE, WorkerGroup
from server.shared.model.load import load_model
from server.shared.model.merged import checkpoint_weights, load_adapted, merged_weights, whole

T = TypeVar("T")


class TrainablePolicy:
    """`model` is trained; `reference()` gives the frozen one. `group` trains it."""

    def __init__(self, model: Any, reference: Any | None) -> None:
        self.model = model.eval()  # Dropout stays off: log-probabilities must be those of the sampling policy.
        self._reference = reference.eval() if reference is not None else None
        self._pass = Pass(self.model)
        self._reference_pass = Pass(self._reference) if reference is not None else self._pass
        self.group = ALONE

    @classmethod
    def create(
        cls,
        reference: Path,
        settings: PolicySettings,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> "TrainablePolicy":
        """A policy equal to the reference in `reference`, a Hugging Face directory; `seed` initialises the adapters.
        Activations are checkpointed if the setting is `on`: a round decides what `auto` means before."""

        def load() -> Any:
            model = load_model(reference, trust_remote_code, dtype=dtype, device_map=device)
            if settings.checkpoint_activations == "on":
                checkpoint_layers(model)
            return model

        base = load()
        if settings.train == "full":
            freeze_constants(base)
            # Checkpointed like the policy, though it has no backward pass: their passes must round alike.
            return cls(base, load().requires_grad_(False))
        # PEFT draws on the CPU, so that adapters begin alike on every device.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cls(lora(base, settings.lora_rank, settings.lora_alpha), None)

    def shard(self, group: WorkerGroup, mesh: DeviceMesh) -> None:
        """Spreads the weights over the workers of a group, and moves them to the mesh's devices. From then on every
        worker must do with the policy what the others do."""
        self.group = group
        shard(self._pass, mesh)
        if self._reference is not None:
            shard(self._reference_pass, mesh)

    def run(self, compute: Callable[[Any], T]) -> T:
        """What `compute` gives for the model: a forward pass, for which sharded weights are gathered."""
        result: T = self._pass(compute)
        return result

    def run_reference(self, compute: Callable[[Any], T]) -> T:
        """Like `run`, for the frozen reference."""
        with self.reference():
            result: T = self._reference_pass(compute)
        return result

    def load(self, directory: Path) -> None:
        """Loads the weights of a saved version: an adapter for LoRA, all weights for full."""
        if self._reference is None:
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            set_peft_model_state_dict(self.model, load_file(directory / "adapter_model.safetensors"))
            return
        saved, info = type(self.model).from_pretrained(
            directory, config=self.model.config, dtype=self.model.dtype, output_loading_info=True
        )
        if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise ValueError(f"{directory.name} does not hold the weights of this model.")
        self.model.load_state_dict(saved.state_dict())

    def save(self, directory: Path) -> None:
        """Writes safetensors in PEFT or Hugging Face layout; of several workers, the one that leads does."""
        if self._reference is None:
            weights = {name: whole(value) for name, value in self.model.state_dict().items() if "lora_" in name}
            # The manifest has the adapter's base version; a path here would be this machine's.
            self.model.peft_config["default"].base_model_name_or_path = None
            if self.group.leads:
                self.model.save_pretrained(directory, state_dict=weights)
                (directory / "README.md").unlink(missing_ok=True)
            return
        self.save_merged(directory)

    def save_merged(self, directory: Path) -> None:
        """Writes all weights, adapters merged, in Hugging Face layout."""
        weights = {name: tensor.contiguous() for name, tensor in merged_weights(self.model)}
        model = self.model.get_base_model() if self._reference is None else self.model
        if self.group.leads:
            model.save_pretrained(directory, state_dict=weights)

    @torch.no_grad()
    def disturb(self, size: float, seed: int) -> None:
        """Sets the policy to its reference plus normal random numbers, which depend on the seed alone: of standard
        deviation `size` in each adapter's second matrix, or of `size` times its own root mean square in each weight."""
        self.reset()
        generator = torch.Generator().manual_seed(seed)
        adapters = self._reference is None
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or (adapters and "lora_B" not in name):
                continue
            own = 1.0 if adapters else float(parameter.float().square().mean().sqrt())
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=size * own)

    @torch.no_grad()
    def reset(self) -> None:
        """Makes the policy equal to its reference again."""
        if self._reference is not None:
            self.model.load_state_dict(self._reference.state_dict())
            return
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def reference(self) -> AbstractContextManager[Any]:
        """The frozen reference, as a context manager."""
        if self._reference is not None:
            return nullcontext(self._reference)
        return _AdaptersOff(self.model)

    def engine_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its checkpoint name, adapters merged."""
        return checkpoint_weights(self.model)

    def reference_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Like `engine_weights`, for the reference."""
        return checkpoint_weights(self._reference if self._reference is not None else self.model, adapters=False)


class _AdaptersOff(AbstractContextManager[Any]):
    def __init__(self, model: Any) -> None:
        self._model, self._context = model, model.disable_adapter()

    def __enter__(self) -> Any:
        self._context.__enter__()
        return self._model

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def freeze_constants(model: Any) -> None:
    """Excludes from training what the family's own code does not train, such as a router's bias that only its authors'
    balancing sets (Ernie 4.5). Loading a checkpoint makes every parameter trainable."""
    with torch.device("meta"), meta_device_safe_creation_ops():
        made = type(model)(model.config)
    for name, parameter in made.named_parameters():
        model.get_parameter(name).requires_grad_(parameter.requires_grad)


def lora(base: Any, rank: int, alpha: int) -> Any:
    """`base` with new adapters on every linear layer except the output layer, in the base's precision: a float32
    adapter would cast every activation back and forth. Small steps are not lost, since Adam steps float32 masters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=unadaptable(base),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def unadaptable(base: Any) -> list[str]:
    """Layers that get no adapter: routers, and those of state-space layers whose matrix a fused kernel reads directly,
    so that an adapter would be skipped."""
    routers = [name for name, module in base.named_modules() if "Router" in type(module).__name__]
    mixers = [name for name, module in base.named_modules() if hasattr(module, "A_log")]
    return routers + [f"{mixer}.{name}" for mixer in mixers for name in ("conv1d", "dt_proj", "out_proj")]


def published_weights(
    directory: Path, base: Path | None, dtype: torch.dtype, trust_remote_code: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of a published version: all weights as they are, or an adapter merged into `base` in
    `dtype`."""
    if base is None:
        from safetensors.torch import load_file

        for path in sorted(directory.glob("*.safetensors")):
            yield from load_file(path).items()
        return
    yield from checkpoint_weights(load_adapted(base, directory, dtype, trust_remote_code))

"""Model families that cannot be served, or cannot learn, and why.

Tried with a tiny model of each family (docs/models.md). A family that was not tried is compared with the trainer at the
start of every round.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.shared.model.dtype import DtypeName, engine_is_for_cpus

Work = Literal["serving", "learning", "full training"]
# The last two need the one before.
WORKS: tuple[Work, ...] = ("serving", "learning", "full training")


@dataclass(frozen=True)
class Limit:
    """The first of WORKS that a family cannot do, and `reason`, a clause. `only`: where that is so."""

    work: Work
    reason: str
    only: Literal["", "cpu", "cpu in float32", "cpu, AVX2 excepted"] = ""

    def rules_out(self, work: Work) -> bool:
        return WORKS.index(self.work) <= WORKS.index(work)


NO_WAY = (
    'vLLM 0.32 has no code for it: "does not dispatch through the Transformers attention interface and vLLM has no '
    'other way to handle it"'
)
SCAN = "vLLM's build for CPUs lacks the operation selective_scan_fwd"
INSPECTED = (
    "vLLM 0.32 for CPUs cannot load its code for it: "
    "\"Model architectures ['Qwen3_5ForCausalLM'] failed to be inspected\""
)
CONVOLUTION = (
    "vLLM's code for AVX-512 with bfloat16 computes its short convolutions wrong, by up to 1.3 nats per token, and "
    "only that for AVX2 was seen to be right"
)
# By transformers' `model_type`, as tried with vLLM 0.32 and transformers 5.19.
LIMITS: dict[str, Limit] = {
    "bamba": Limit("serving", NO_WAY),
    "gpt_oss": Limit("full training", "vLLM 0.32 drops the weights of its experts when weights are loaded again"),
    "jamba": Limit("serving", SCAN, "cpu"),
    "lfm2": Limit("serving", CONVOLUTION, "cpu, AVX2 excepted"),
    "lfm2_moe": Limit("serving", CONVOLUTION, "cpu, AVX2 excepted"),
    "mamba": Limit("serving", SCAN, "cpu"),
    "mpt": Limit("serving", 'vLLM 0.32 has no code for it: "was supported in vLLM until v0.28.0"'),
    "phimoe": Limit("serving", 'vLLM 0.32 cannot run it: "too many values to unpack (expected 3)"'),
    "qwen3_5_text": Limit("serving", INSPECTED, "cpu"),
    "qwen3_next": Limit("serving", 'vLLM for CPUs says "CPU GDN attention requires BF16"', "cpu in float32"),
    "recurrent_gemma": Limit("serving", NO_WAY),
}


def limit_of(directory: Path, dtype: DtypeName, work: Work) -> Limit | None:
    """What rules out this work for the model in a Hugging Face directory, in `dtype`, on this machine; None if nothing
    that is known does."""
    limit = LIMITS.get(family_of(directory))
    if limit is None or not limit.rules_out(work):
        return None
    on_cpu = engine_is_for_cpus()
    holds = {
        "": True,
        "cpu": on_cpu,
        "cpu in float32": on_cpu and dtype == "float32",
        "cpu, AVX2 excepted": on_cpu and not has_avx2_only(),
    }
    return limit if holds[limit.only] else None


def has_avx2_only() -> bool:
    """Whether vLLM uses its code for AVX2: by the capabilities that it asks for."""
    import torch

    found = torch.cpu.get_capabilities()
    return bool(found.get("avx2")) and not found.get("avx512_f")


def family_of(directory: Path) -> str:
    """The `model_type` of the model, or of its text part if it also reads images; an empty string without one, as for
    the packaged default before it is prepared."""
    path = directory / "config.json"
    config = json.loads(path.read_bytes()) if path.exists() else {}
    return str((config.get("text_config") or {}).get("model_type") or config.get("model_type", ""))

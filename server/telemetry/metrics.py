"""The Prometheus metrics. No label ever names a user, a conversation or a text.

They are global to the process and set by the code that measures them. Units are seconds and tokens.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

CALLS = Counter("prefloop_calls", "Finished RPCs by status.", ["rpc", "code"], registry=REGISTRY)
CALL_SECONDS = Histogram(
    "prefloop_call_seconds",
    "Duration of an RPC, to the end of a stream.",
    ["rpc"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
    registry=REGISTRY,
)
FIRST_TOKEN_SECONDS = Histogram(
    "prefloop_first_token_seconds",
    "Time from the request to the engine to the first text of an answer.",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
    registry=REGISTRY,
)
TOKEN_SECONDS = Histogram(
    "prefloop_token_seconds",
    "Time per token of an answer after its first text.",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
    registry=REGISTRY,
)
TOKENS = Counter("prefloop_tokens", "Tokens of prompts and of answers.", ["kind"], registry=REGISTRY)
ANSWERS = Gauge("prefloop_answers", "Answers that are sampled or waiting.", registry=REGISTRY)
ANSWERS_LIMIT = Gauge("prefloop_answers_sampled_at_once", "Answers that the engine samples at once.", registry=REGISTRY)
SERVING = Gauge("prefloop_serving", "1 while the health service says SERVING.", registry=REGISTRY)
ENGINE_RESTARTS = Counter("prefloop_engine_restarts", "Engines that died and were restarted.", registry=REGISTRY)
ENGINE_HANGS = Counter(
    "prefloop_engine_hangs", "Engines that hung and were killed, a part of the restarts.", registry=REGISTRY
)
ACTIVE_POLICY = Gauge(
    "prefloop_active_policy", "1 for the version that this server has loaded.", ["version"], registry=REGISTRY
)
SWAPS = Counter("prefloop_swaps", "Swaps, by whether the new version was loaded.", ["result"], registry=REGISTRY)
SWAP_SECONDS = Histogram(
    "prefloop_swap_seconds",
    "Duration of a swap's stages. `gap` is the sum from `pause` to `resume`, while nothing is sampled.",
    ["stage"],
    buckets=(0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
    registry=REGISTRY,
)
VOTES = Counter("prefloop_votes", "Accepted votes; repeated requests count once.", ["kind", "value"], registry=REGISTRY)
ROUNDS = Gauge("prefloop_rounds", "Rounds by state.", ["state"], registry=REGISTRY)
ACTIVATIONS = Gauge(
    "prefloop_activations",
    "How often another version was made the active one, by action: `promote`, `activate`, `rollback`, or `fail` for "
    "one that could not be loaded.",
    ["action"],
    registry=REGISTRY,
)
DISK = Gauge("prefloop_disk_bytes", "The disk of the data directory: `free` and `total`.", ["kind"], registry=REGISTRY)
ROUND = Gauge(
    "prefloop_round",
    "The newest finished round: `votes`, `reward_accuracy`, `kl`, `win_rate`, `seconds`, `finish_time`.",
    ["figure"],
    registry=REGISTRY,
)

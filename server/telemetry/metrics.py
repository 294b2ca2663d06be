"""What is counted and timed, in Prometheus' words. No label ever names a user, a conversation or a text.

One process has one of each; whoever knows a figure sets it here. Units are seconds and tokens.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

CALLS = Counter("prefloop_calls", "RPCs that ended, by their status.", ["rpc", "code"], registry=REGISTRY)
CALL_SECONDS = Histogram(
    "prefloop_call_seconds",
    "How long an RPC took, a stream to its end.",
    ["rpc"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
    registry=REGISTRY,
)
FIRST_TOKEN_SECONDS = Histogram(
    "prefloop_first_token_seconds",
    "From asking the engine for an answer to its first text.",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
    registry=REGISTRY,
)
TOKEN_SECONDS = Histogram(
    "prefloop_token_seconds",
    "Of an answer: its time after the first text, for each token after those.",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
    registry=REGISTRY,
)
TOKENS = Counter("prefloop_tokens", "Tokens of prompts and of answers.", ["kind"], registry=REGISTRY)
ANSWERS = Gauge("prefloop_answers", "Answers under way.", registry=REGISTRY)
ANSWERS_LIMIT = Gauge("prefloop_answers_sampled_at_once", "Of these, how many the engine samples.", registry=REGISTRY)
SERVING = Gauge("prefloop_serving", "1 while the health service says SERVING.", registry=REGISTRY)
ENGINE_RESTARTS = Counter("prefloop_engine_restarts", "Engines that died and were started again.", registry=REGISTRY)
ENGINE_HANGS = Counter(
    "prefloop_engine_hangs", "Of these, engines that answered nothing and were killed.", registry=REGISTRY
)
ACTIVE_POLICY = Gauge(
    "prefloop_active_policy", "1 for the version that is loaded here.", ["version"], registry=REGISTRY
)
SWAPS = Counter("prefloop_swaps", "Swaps, by whether the new version was taken.", ["result"], registry=REGISTRY)
SWAP_SECONDS = Histogram(
    "prefloop_swap_seconds",
    "A swap's stages; nothing is sampled from `pause` to `resume`, which `gap` is the sum of.",
    ["stage"],
    buckets=(0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
    registry=REGISTRY,
)
VOTES = Counter("prefloop_votes", "Votes taken, repeated requests once.", ["kind", "value"], registry=REGISTRY)
ROUNDS = Gauge("prefloop_rounds", "Rounds there were, by their state.", ["state"], registry=REGISTRY)
ROUND = Gauge(
    "prefloop_round",
    "The newest finished round: `votes`, `reward_accuracy`, `kl`, `win_rate`, `seconds`, `finish_time`.",
    ["figure"],
    registry=REGISTRY,
)

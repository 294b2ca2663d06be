"""The server's settings."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from server.shared.loopback import is_loopback
from server.shared.model.dtype import DtypeSetting
from server.store.settings import StoreSettings

DEFAULT_MODEL = "smollm2"


class ServerSettings(StoreSettings):
    """Settings of `server serve` and the other `server` commands."""

    renamed: ClassVar = {
        "gpu_memory_share": "server_gpu_memory_share",
        "duel_alpha": "ab_test_alpha",
        "duel_user_votes": "ab_test_user_votes",
    }

    data_dir: Annotated[Path, Field(description="Directory of the database and the policies.")] = Path("data")
    model: Annotated[
        str,
        Field(description="The model to serve: `smollm2` (the packaged default), a Hugging Face directory or id."),
    ] = DEFAULT_MODEL
    engine: Annotated[
        bool,
        Field(
            description="Sample answers. A server without an engine loads no weights: it takes votes and reviews, and "
            "shows, exports and deletes what is stored."
        ),
    ] = True
    trust_remote_code: Annotated[
        bool,
        Field(description="Run the Python code in the model's directory, if transformers does not know the model."),
    ] = False
    host: Annotated[str, Field(description="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="The port to listen on; 0 picks a free one.")] = 50051
    share_port: Annotated[
        bool,
        Field(
            description="Let several servers without an engine listen on one port; the system spreads connections over "
            "them."
        ),
    ] = False
    tls_cert: Annotated[
        Path | None, Field(description="The PEM file of the TLS certificate with its chain; reread after a renewal.")
    ] = None
    tls_key: Annotated[Path | None, Field(description="The PEM file of the certificate's private key.")] = None
    tls_client_ca: Annotated[
        Path | None,
        Field(description="PEM certificates of the CAs of client certificates; clients must then show one (mTLS)."),
    ] = None
    system_prompt: Annotated[
        str, Field(description="What every conversation begins with, unless its caller says otherwise.")
    ] = ""
    service_temperature: Annotated[
        float, Field(gt=0, le=2, description="Chat's default temperature, also used when the learner samples.")
    ] = 0.85
    compare_temperatures: Annotated[
        tuple[float, float],
        Field(description="Compare's two temperatures, one below and one above the service temperature."),
    ] = (0.7, 1.0)
    scoring_address: Annotated[
        str,
        Field(description="host:port of `learner serve-scores`, on loopback; it then chooses Compare's second answer."),
    ] = ""
    scoring_seconds: Annotated[
        float, Field(gt=0, description="How long a comparison waits for scores before it shows any second answer.")
    ] = 2.0
    compare_candidates: Annotated[
        int, Field(ge=3, le=16, description="Answers sampled for a comparison if scores choose the second one.")
    ] = 4
    max_tokens: Annotated[int, Field(ge=1, description="Default and maximum length of an answer, in tokens.")] = 512
    max_message_chars: Annotated[int, Field(ge=1, description="Maximum length of a message or comment.")] = 16_000
    dtype: Annotated[
        DtypeSetting,
        Field(description="Data type of engines and trainer; `auto`: bfloat16 if the hardware computes in it."),
    ] = "auto"
    max_model_len: Annotated[
        int, Field(ge=64, description="Maximum tokens of a prompt and its answer, within the model's own limit.")
    ] = 2048
    max_streams: Annotated[int, Field(ge=1, description="Answers sampled at the same time; more wait.")] = 64
    max_waiting: Annotated[int, Field(ge=0, description="Answers that may wait; further calls are refused.")] = 192
    max_turns: Annotated[int, Field(ge=1, description="Maximum user messages per conversation.")] = 1000
    user_conversations: Annotated[int, Field(ge=1, description="Maximum stored conversations per user.")] = 10_000
    user_demonstrations: Annotated[int, Field(ge=1, description="Maximum stored demonstrations per user.")] = 1_000
    user_rate: Annotated[int, Field(ge=1, description="Calls per minute and user; all may come at once.")] = 1200
    user_calls: Annotated[int, Field(ge=1, description="Concurrent calls per user.")] = 32
    application_calls: Annotated[
        int, Field(ge=1, description="Concurrent calls of an application, for all its end users together.")
    ] = 128
    call_seconds: Annotated[float, Field(gt=0, description="Maximum duration of a call.")] = 600.0
    max_connections: Annotated[int, Field(ge=1, description="Open connections; more are closed.")] = 2000
    kv_cache_gib: Annotated[int, Field(ge=1, description="Memory for the KV cache on a CPU.")] = 1
    server_gpu_memory_share: Annotated[
        float, Field(gt=0, le=1, description="Share of the GPU's memory for the server's engine.")
    ] = 0.5
    cpu_threads: Annotated[
        str,
        Field(
            description="Cores that the engine's threads are bound to on a CPU, as `0-3,6`; `auto`: all cores, unbound."
        ),
    ] = "auto"
    compile: Annotated[
        bool, Field(description="Compile the model at the first start: takes a minute once, then answers are faster.")
    ] = True
    keep_kv_on_swap: Annotated[
        bool,
        Field(description="Keep the old version's KV cache after a swap: a shorter gap, marked in the spans."),
    ] = False
    serve_adapters: Annotated[
        bool,
        Field(description="Serve LoRA adapters side by side on the reference instead of merged weights; for a GPU."),
    ] = False
    live_adapters: Annotated[int, Field(ge=1, description="Adapters that can answer in one batch.")] = 4
    adapter_rank: Annotated[int, Field(ge=1, le=512, description="Maximum rank of an adapter.")] = 16
    ab_test_alpha: Annotated[
        float,
        Field(ge=0, lt=1, description="Roll a new adapter back once the evidence against it is 1 / this; 0: no test."),
    ] = 0.05
    ab_test_voters: Annotated[
        int,
        Field(
            ge=1,
            description="From this many voters on, one vote per user counts in an A/B test; several of each of fewer, "
            "and all of a single voter.",
        ),
    ] = 10
    ab_test_user_votes: Annotated[
        int, Field(ge=1, description="Votes per user that count in an A/B test if there are fewer voters than that.")
    ] = 10
    hang_seconds: Annotated[
        float | None,
        Field(
            ge=0,
            description="Kill an engine whose process does not run, or whose step does not end, for this long; 0: "
            "never. Default: 10 s for the process; for a step ten times the slowest so far, but at least 30 s.",
        ),
    ] = None
    metrics_host: Annotated[str, Field(description="The address of /metrics and /healthz over HTTP.")] = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535, description="The port of both; 0 picks a free one.")] = 9464
    otlp_endpoint: Annotated[
        str, Field(description="An OpenTelemetry collector for traces, as `http://127.0.0.1:4317`; empty: no traces.")
    ] = ""
    log_format: Annotated[Literal["text", "json"], Field(description="Format of the log on standard error.")] = "text"
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], Field(description="DEBUG logs every call.")] = (
        "INFO"
    )
    retention_days: Annotated[
        float,
        Field(ge=0, description="Delete conversations without a message or vote for this long; 0 keeps them."),
    ] = 0.0
    poll_seconds: Annotated[float, Field(gt=0, description="Interval between checks for a new active version.")] = 0.5
    grace_seconds: Annotated[float, Field(ge=0, description="How long open streams may continue after SIGTERM.")] = 30.0

    @field_validator("scoring_address")
    @classmethod
    def _near(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if address and (not is_loopback(host.strip("[]")) or not port.isdigit()):
            raise ValueError("must be host:port with a host on loopback: user messages are sent unencrypted")
        return address

    @model_validator(mode="after")
    def _certificate_and_key(self) -> "ServerSettings":
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            raise ValueError("tls_cert and tls_key must be set together, and tls_client_ca requires both")
        return self

    @model_validator(mode="after")
    def _alike(self) -> "ServerSettings":
        if self.share_port and self.engine:
            raise ValueError("share_port requires engine = false: only servers without an engine are all alike")
        return self

    @model_validator(mode="after")
    def _straddle(self) -> "ServerSettings":
        low, high = self.compare_temperatures
        if not 0 <= low < self.service_temperature < high <= 2:
            raise ValueError(
                f"compare_temperatures {low}, {high} must be below and above service_temperature "
                f"{self.service_temperature}, within 0 to 2"
            )
        return self

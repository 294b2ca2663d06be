"""The server's settings."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from server.shared.loopback import is_loopback
from server.shared.model.dtype import DtypeSetting
from server.shared.settings_base import SettingsBase

DEFAULT_MODEL = "smollm2"


class ServerSettings(SettingsBase):
    """What `server serve` and the commands beside it are told."""

    renamed: ClassVar = {
        "gpu_memory_share": "server_gpu_memory_share",
        "duel_alpha": "ab_test_alpha",
        "duel_user_votes": "ab_test_user_votes",
    }

    data_dir: Annotated[Path, Field(description="All that is kept: the database and the policies.")] = Path("data")
    model: Annotated[
        str,
        Field(description="What v0000 is made from: `smollm2` (the packaged default), a Hugging Face directory or id."),
    ] = DEFAULT_MODEL
    host: Annotated[str, Field(description="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="The port to listen on; 0 takes a free one.")] = 50051
    tls_cert: Annotated[
        Path | None, Field(description="The PEM file of the TLS certificate, with its chain; read again when renewed.")
    ] = None
    tls_key: Annotated[Path | None, Field(description="The PEM file of the certificate's private key.")] = None
    tls_client_ca: Annotated[
        Path | None,
        Field(description="PEM certificates of who signs clients' certificates, where clients must show one (mTLS)."),
    ] = None
    service_temperature: Annotated[
        float, Field(gt=0, le=2, description="Chat's default temperature, and the one that the learner samples at.")
    ] = 0.85
    compare_temperatures: Annotated[
        tuple[float, float],
        Field(description="Compare's two temperatures, one on each side of the service temperature."),
    ] = (0.7, 1.0)
    scoring_address: Annotated[
        str,
        Field(description="host:port of `learner serve-scores`, on loopback; Compare's second answer is then chosen."),
    ] = ""
    scoring_seconds: Annotated[
        float, Field(gt=0, description="How long a comparison waits for scores before any second answer will do.")
    ] = 2.0
    compare_candidates: Annotated[
        int, Field(ge=3, le=16, description="Answers sampled for a comparison where the second one is chosen.")
    ] = 4
    max_tokens: Annotated[int, Field(ge=1, description="The default and the largest length of an answer.")] = 512
    max_message_chars: Annotated[int, Field(ge=1, description="The longest message, comment or correction.")] = 16_000
    dtype: Annotated[
        DtypeSetting,
        Field(description="Arithmetic of engines and trainer; `auto`: bfloat16 where the hardware computes in it."),
    ] = "auto"
    max_model_len: Annotated[
        int, Field(ge=64, description="Tokens of a prompt and its answer together, at most what the model has.")
    ] = 2048
    max_streams: Annotated[int, Field(ge=1, description="Answers that are sampled at once; more wait.")] = 64
    max_waiting: Annotated[int, Field(ge=0, description="Answers that may wait; beyond, a call is refused.")] = 192
    max_turns: Annotated[int, Field(ge=1, description="Messages of a user in one conversation.")] = 1000
    user_conversations: Annotated[int, Field(ge=1, description="Conversations of one user that are kept.")] = 10_000
    user_demonstrations: Annotated[int, Field(ge=1, description="Demonstrations of one user that are kept.")] = 1_000
    user_rate: Annotated[int, Field(ge=1, description="Calls of one user a minute; as many may come at once.")] = 1200
    user_calls: Annotated[int, Field(ge=1, description="Calls of one user at once.")] = 32
    call_seconds: Annotated[float, Field(gt=0, description="How long any call may take.")] = 600.0
    max_connections: Annotated[int, Field(ge=1, description="Connections at once; more are closed.")] = 2000
    kv_cache_gib: Annotated[int, Field(ge=1, description="Memory for the KV cache on a CPU.")] = 1
    server_gpu_memory_share: Annotated[
        float, Field(gt=0, le=1, description="Share of the GPU's memory for the server's engine.")
    ] = 0.5
    cpu_threads: Annotated[
        str,
        Field(
            description="Cores that the engine's threads are bound to on a CPU, as `0-3,6`; `auto`: none, but all used."
        ),
    ] = "auto"
    compile: Annotated[
        bool, Field(description="Compile the model at the first start: a minute once, faster answers ever after.")
    ] = True
    keep_kv_on_swap: Annotated[
        bool,
        Field(description="Go on over the old version's KV cache after a swap: a shorter gap, marked in the spans."),
    ] = False
    serve_adapters: Annotated[
        bool,
        Field(description="Serve LoRA adapters on the reference side by side instead of merged weights: for a GPU."),
    ] = False
    live_adapters: Annotated[int, Field(ge=1, description="Adapters that answer at once in one batch.")] = 4
    adapter_rank: Annotated[int, Field(ge=1, le=512, description="The largest rank of an adapter.")] = 16
    ab_test_alpha: Annotated[
        float,
        Field(ge=0, lt=1, description="A new adapter is rolled back at 1 / this of evidence that it lost; 0: no test."),
    ] = 0.05
    ab_test_user_votes: Annotated[
        int, Field(ge=1, description="Votes of one user that count between two versions.")
    ] = 10
    hang_seconds: Annotated[
        float | None,
        Field(
            ge=0,
            description="An engine whose process does not run, or whose step does not end, for so long is killed; 0: "
            "never. Default: 10 s for the process; for a step ten times the slowest so far, and 30 s at least.",
        ),
    ] = None
    metrics_host: Annotated[str, Field(description="Where /metrics and /healthz are served over HTTP.")] = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535, description="Their port; 0 takes a free one.")] = 9464
    otlp_endpoint: Annotated[
        str, Field(description="An OpenTelemetry collector for traces, as `http://127.0.0.1:4317`; empty: no traces.")
    ] = ""
    log_format: Annotated[Literal["text", "json"], Field(description="Of the log on standard error.")] = "text"
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], Field(description="DEBUG has a line for every call.")
    ] = "INFO"
    retention_days: Annotated[
        float,
        Field(ge=0, description="Conversations without a message or vote for so long are deleted; 0 keeps them."),
    ] = 0.0
    poll_seconds: Annotated[float, Field(gt=0, description="How often the pointer is read.")] = 0.5
    grace_seconds: Annotated[float, Field(ge=0, description="How long open streams may run on after SIGTERM.")] = 30.0

    @field_validator("scoring_address")
    @classmethod
    def _near(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if address and (not is_loopback(host.strip("[]")) or not port.isdigit()):
            raise ValueError("must be host:port with a host on loopback: what users asked travels there in the clear")
        return address

    @model_validator(mode="after")
    def _certificate_and_key(self) -> "ServerSettings":
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            raise ValueError("tls_cert and tls_key belong together, and tls_client_ca needs both")
        return self

    @model_validator(mode="after")
    def _straddle(self) -> "ServerSettings":
        low, high = self.compare_temperatures
        if not 0 <= low < self.service_temperature < high <= 2:
            raise ValueError(
                f"compare_temperatures {low}, {high} must lie on both sides of service_temperature "
                f"{self.service_temperature}, within 0 to 2"
            )
        return self

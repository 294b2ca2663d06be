"""The machine judge: a model that chooses between stored answers."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from learner.number_types import Positive
from server.shared.loopback import is_loopback

# What the judge is asked to decide by, unless the operator has another file.
RUBRIC = Path(__file__).parent / "judge" / "rubric.txt"


class JudgeSettings(BaseModel):
    """An OpenAI-compatible endpoint, such as another vLLM server, that chooses between answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field("", description="Where it is, such as `http://127.0.0.1:8000/v1`. Empty: there is no judge.")
    host: str = Field(
        "",
        description="The host of `url`, to be named again here if it is not this machine: users' texts are sent there.",
    )
    model: str = Field("", description="The model's name at the endpoint.")
    api_key: SecretStr = Field(SecretStr(""), exclude=True, description="The endpoint's key; never stored.")
    rubric_file: Path | None = Field(
        None, description="A text that says which answer is better. Default: the one in learner/judge/rubric.txt."
    )
    pairs: int = Field(1_000, ge=1, description="Maximum number of comparisons that one run judges, newest first.")
    concurrency: int = Field(4, ge=1, description="Requests at a time.")
    requests_per_minute: Positive = Field(600.0, description="Maximum rate of requests.")
    timeout_seconds: Positive = Field(120.0, description="How long a request may take.")
    max_tokens: int = Field(
        8, ge=1, description="Maximum tokens of a reply: a letter, or the reasoning of a model that cannot do without."
    )
    extra_body: dict[str, Any] = Field(
        {}, description='More fields of each request, such as `{"chat_template_kwargs": {"enable_thinking": false}}`.'
    )
    prompt_price: float = Field(0.0, ge=0, description="Price of a million prompt tokens, to show what a run cost.")
    answer_price: float = Field(0.0, ge=0, description="Price of a million answer tokens.")

    @model_validator(mode="after")
    def _may_be_asked(self) -> "JudgeSettings":
        if not self.url:
            return self
        parts = urlsplit(self.url)
        host = parts.hostname
        # A password in it would be stored with each round.
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.query:
            raise ValueError(
                f"judge.url {self.url!r} is not a URL such as http://127.0.0.1:8000/v1 (the key is judge.api_key)"
            )
        if not self.model:
            raise ValueError("judge.url needs judge.model, the name of a model there")
        if not is_loopback(host) and self.host.lower() != host:
            raise ValueError(
                f"users' texts would leave this machine for judge.url: set judge.host to {host} if they may"
            )
        return self

    @cached_property
    def rubric(self) -> str:
        """The rubric's text. Raises OSError or UnicodeDecodeError."""
        return (self.rubric_file or RUBRIC).read_text(encoding="utf-8").strip()

    @property
    def name(self) -> str:
        """The judge's name: its model, and a digest of its rubric, since another rubric is another judge. Empty if
        there is none."""
        return f"{self.model} {hashlib.sha256(self.rubric.encode()).hexdigest()[:8]}" if self.url else ""

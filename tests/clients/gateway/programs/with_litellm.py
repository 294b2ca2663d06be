"""LiteLLM, which knows OpenAI's errors by its own names."""

import json
import os
import sys

# It fetches a list of prices otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import httpx
import litellm

litellm.telemetry = False
url, key, wrong = sys.argv[1:]
said = [{"role": "user", "content": "hello"}]
given = {"model": "openai/prefloop", "messages": said, "api_base": url, "api_key": key, "num_retries": 0, "timeout": 20}
found = {}

chunks = list(litellm.completion(**given, stream=True, stream_options={"include_usage": True}))
found["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
found["tokens"] = next(chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None))

stream = litellm.completion(**given, stream=True)
for chunk in stream:
    if chunk.choices[0].delta.content:
        break
stream.completion_stream.close()

answer = litellm.completion(**given)
headers = {"authorization": f"Bearer {key}"}
httpx.post(f"{url}/feedback", json={"id": answer.id, "value": True, "comment": "with litellm"}, headers=headers)
found["voted"] = answer.id

two = litellm.completion(**given, n=2)
found["two"] = [choice.message.content for choice in two.choices]
httpx.post(f"{url}/feedback", json={"id": two.id, "value": "b"}, headers=headers)

found["pinned"] = litellm.completion(**{**given, "model": "openai/prefloop@v0000"}).model

try:
    litellm.completion(**{**given, "api_key": wrong})
except litellm.AuthenticationError:
    found["wrong key"] = "invalid_api_key"
try:
    litellm.completion(**{**given, "messages": [{"role": "user", "content": "a " * 30}]})
except litellm.ContextWindowExceededError:
    found["too long"] = "context_length_exceeded"
print(json.dumps(found))

"""OpenAI's own client. Prints what it got as one JSON object."""

import json
import sys

import openai

url, key, wrong = sys.argv[1:]
said = [{"role": "user", "content": "hello"}]
client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=20)
found = {}

stream = client.chat.completions.create(
    model="prefloop", messages=said, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
found["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
found["tokens"] = chunks[-1].usage.completion_tokens

with client.chat.completions.create(model="prefloop", messages=said, stream=True) as stream:
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break

answer = client.chat.completions.create(model="prefloop", messages=said)
client.post("/feedback", body={"id": answer.id, "value": True, "comment": "with openai"}, cast_to=object)
found["voted"] = answer.id

two = client.chat.completions.create(model="prefloop", messages=said, n=2)
found["two"] = [choice.message.content for choice in two.choices]
client.post("/feedback", body={"id": two.id, "value": "b"}, cast_to=object)

found["pinned"] = client.chat.completions.create(model="prefloop@v0000", messages=said).model
found["models"] = [model.id for model in client.models.list()]

try:
    openai.OpenAI(base_url=url, api_key=wrong, max_retries=0).chat.completions.create(model="prefloop", messages=said)
except openai.AuthenticationError as error:
    found["wrong key"] = error.code
try:
    client.chat.completions.create(model="prefloop", messages=[{"role": "user", "content": "a " * 30}])
except openai.BadRequestError as error:
    found["too long"] = error.code
print(json.dumps(found))

"""LangChain's ChatOpenAI."""

import json
import sys

import httpx
import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

url, key, wrong = sys.argv[1:]
found = {}


def model(**given):
    return ChatOpenAI(
        **{"model": "prefloop", "base_url": url, "api_key": key, "max_retries": 0, "timeout": 20, **given}
    )


chunks = list(model(stream_usage=True).stream("hello"))
found["stream"] = "".join(chunk.content for chunk in chunks)
found["tokens"] = next(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata)

stream = model().stream("hello")
for chunk in stream:
    if chunk.content:
        break
stream.close()

answer = model().invoke([("system", "be kind"), ("human", "hello")])
headers = {"authorization": f"Bearer {key}"}
identifier = answer.response_metadata["id"]
httpx.post(f"{url}/feedback", json={"id": identifier, "value": True, "comment": "with langchain"}, headers=headers)
found["voted"] = identifier

two = model(n=2).generate([[HumanMessage("hello")]])
found["two"] = [one.text for one in two.generations[0]]

found["pinned"] = model(model="prefloop@v0000").invoke("hello").response_metadata["model_name"]

try:
    model(api_key=wrong).invoke("hello")
except openai.AuthenticationError as error:
    found["wrong key"] = error.code
try:
    model().invoke("a " * 30)
except openai.BadRequestError as error:
    found["too long"] = error.code
print(json.dumps(found))

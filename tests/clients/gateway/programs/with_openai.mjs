// OpenAI's own client for JavaScript.
import OpenAI from "openai";

const [url, key, wrong] = process.argv.slice(2);
const messages = [{ role: "user", content: "hello" }];
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0, timeout: 20000 });
const completions = client.chat.completions;
const found = {};

let text = "";
for await (const chunk of await completions.create({
  model: "prefloop", messages, stream: true, stream_options: { include_usage: true },
})) {
  text += chunk.choices[0]?.delta.content ?? "";
  if (chunk.usage) found.tokens = chunk.usage.completion_tokens;
}
found.stream = text;

const stream = await completions.create({ model: "prefloop", messages, stream: true });
for await (const chunk of stream) {
  if (chunk.choices[0].delta.content) break;
}
stream.controller.abort();

const answer = await completions.create({ model: "prefloop", messages });
await client.post("/feedback", { body: { id: answer.id, value: true, comment: "with node" } });
found.voted = answer.id;

const two = await completions.create({ model: "prefloop", messages, n: 2 });
found.two = two.choices.map((choice) => choice.message.content);
await client.post("/feedback", { body: { id: two.id, value: "b" } });

found.pinned = (await completions.create({ model: "prefloop@v0000", messages })).model;
found.models = [];
for await (const model of client.models.list()) found.models.push(model.id);

try {
  const stranger = new OpenAI({ baseURL: url, apiKey: wrong, maxRetries: 0 });
  await stranger.chat.completions.create({ model: "prefloop", messages });
} catch (error) {
  if (error instanceof OpenAI.AuthenticationError) found["wrong key"] = error.code;
}
try {
  await completions.create({ model: "prefloop", messages: [{ role: "user", content: "a ".repeat(30) }] });
} catch (error) {
  if (error instanceof OpenAI.BadRequestError) found["too long"] = error.code;
}
console.log(JSON.stringify(found));

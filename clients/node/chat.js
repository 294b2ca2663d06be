// Sends a message to a prefloop server, sends it again for two answers, and submits your votes:
//   node chat.js "Why is the sky blue?"
import { createInterface } from "node:readline";
import { connect, sentence } from "./prefloop.js";

const { PREFLOOP_HOST: host = "127.0.0.1", PREFLOOP_PORT: port = "50051", PREFLOOP_USER: user = "ana" } = process.env;
const { PREFLOOP_API_KEY: key, PREFLOOP_CA: ca, PREFLOOP_SECONDS: seconds = 600 } = process.env;
const THUMBS = { y: "THUMB_UP", n: "THUMB_DOWN" };
const CHOICES = { a: "CHOICE_A", b: "CHOICE_B", tie: "CHOICE_TIE", bad: "CHOICE_BOTH_BAD" };
// Control characters and marks that change the writing direction: model output must not control the terminal.
const CONTROLS = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g;

const lines = createInterface({ input: process.stdin });
const typed = lines[Symbol.asyncIterator]();
const print = (text) => process.stdout.write(text.replace(CONTROLS, ""));

async function ask(question) {
  print(question);
  return (await typed.next()).value; // Undefined at the end of the input.
}

async function chat(server, message) {
  let response_id;
  for await (const { event, started, delta } of server.stream("Chat", { message })) {
    if (event === "started") ({ response_id } = started);
    if (event === "delta") print(delta.text);
  }
  const thumb = THUMBS[await ask("\nGood? y or n: ")];
  if (thumb) await server.vote("SubmitThumb", { response_id, thumb });
}

async function compare(server, message) {
  let comparison_id;
  for await (const { event, started, finished } of server.stream("Compare", { message })) {
    if (event === "started") ({ comparison_id } = started);
    if (event === "finished") print(`\n${finished.slot}: ${finished.text}\n`);
  }
  const choice = CHOICES[await ask("Better? a, b, tie or bad: ")];
  if (choice) await server.vote("SubmitChoice", { comparison_id, choice });
}

let server;
// Ctrl-C: the server stops sampling and stores the answer so far.
process.once("SIGINT", () => server?.cancel() || process.exit(130));
try {
  server = connect({ host, port, user, key, ca, seconds });
  await chat(server, process.argv[2] ?? "Why is the sky blue?");
  await compare(server, process.argv[2] ?? "Why is the sky blue?");
} catch (error) {
  console.error(`chat.js: ${sentence(error)}`);
  process.exitCode = 1;
} finally {
  lines.close();
  server?.close();
}

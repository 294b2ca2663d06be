// A connection to a prefloop server. The protos are loaded at run time, and fields keep their proto names.
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const includeDirs = ["../../proto/", "./"].map((folder) => fileURLToPath(new URL(folder, import.meta.url)));
const files = ["prefloop/v1/chat.proto", "prefloop/v1/feedback.proto", "errors.proto"];
const shape = { keepCase: true, enums: String, longs: String, defaults: true, oneofs: true };
const definitions = protoLoader.loadSync(files, { includeDirs, ...shape });
const { ChatService, FeedbackService } = grpc.loadPackageDefinition(definitions).prefloop.v1;

// `seconds` limits each call. Returns `stream(rpc, request)`, an async iterable of an answer's events; `vote(rpc,
// request)`, a promise of the reply; `cancel()`, which cancels the open call and returns whether there was one; `close()`.
export function connect({ host, port, user, key, ca, seconds }) {
  // Unencrypted only to this machine's loopback, which no proxy can reach; an API key must stay secret.
  const loopback = ["127.0.0.1", "::1", "localhost"].includes(host);
  const tls = ca || !loopback;
  const credentials = tls ? grpc.credentials.createSsl(ca ? readFileSync(ca) : null) : grpc.credentials.createInsecure();
  const address = host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
  const options = { "grpc.enable_http_proxy": loopback ? 0 : 1 };
  const chat = new ChatService(address, credentials, options);
  const feedback = new FeedbackService(address, credentials, options);
  const metadata = new grpc.Metadata();
  if (key) metadata.set("authorization", `Bearer ${key}`);
  else metadata.set("x-user-id", user);

  let open;
  const begin = (call) => (open = call.once("status", () => (open = undefined)));
  const limit = () => ({ deadline: Date.now() + seconds * 1000 });
  return {
    stream: (rpc, request) => begin(chat[rpc](request, metadata, limit())),
    vote: (rpc, request) =>
      new Promise((resolve, reject) => {
        begin(feedback[rpc](request, metadata, limit(), (error, reply) => (error ? reject(error) : resolve(reply))));
      }),
    cancel() {
      const had = open;
      had?.cancel();
      return Boolean(had);
    },
    close: () => [chat, feedback].forEach((client) => client.close()),
  };
}

// One sentence for the user, with the server's machine-readable reason if it sent one.
export function sentence(error) {
  const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
  const { details } = packed ? definitions["google.rpc.Status"].deserialize(packed) : { details: [] };
  const info = details.find(({ type_url }) => type_url.endsWith("/google.rpc.ErrorInfo"));
  const reason = info && definitions["google.rpc.ErrorInfo"].deserialize(info.value).reason;
  return (error.details || error.message) + (reason ? ` (${reason})` : "");
}

// Submits forms without leaving the page and replaces the changed parts by the server's HTML. Without this script
// everything still works, with reloads.

const AWAY = "This page's own server does not answer. The page keeps trying; no messages or votes are lost.";
const RETRY_MS = 2000;
// A reader this close to the end stays at the end as the page grows. Less than one notch of a mouse wheel.
const NEAR_END_PX = 8;

const policy = window.trustedTypes?.createPolicy("prefloop", { createHTML: (html) => html }) ?? {
  createHTML: (html) => html,
};
const byId = (id) => document.getElementById(id);
// The HTML that the server sent for each live element. An element is replaced only if it has changed, so that opened
// sections and unsent text stay.
const sent = new WeakMap();
let following = null;
let retry = null;
// The number of actions sent so far. A page that was requested before the last one is out of date.
let actions = 0;
// Whether the notice is about an unreachable server and disappears when it is back. The error of an action stays until
// the next action.
let passing = false;
// A message that was sent but got no response.
let unanswered = null;

function parse(html) {
  return new DOMParser().parseFromString(policy.createHTML(html), "text/html");
}

function place(page) {
  const atEnd = innerHeight + scrollY > document.body.scrollHeight - NEAR_END_PX;
  for (const element of page.querySelectorAll("[data-live]")) {
    const html = element.outerHTML;
    const old = byId(element.id);
    if (old && sent.get(old) === html) continue;
    if (old?.id === "ids" && unanswered !== null && byId("message").value === unanswered) continue;
    const parent = old ? null : byId(element.parentElement.id);
    const focused = old?.contains(document.activeElement) ? document.activeElement.id : null;
    const live = document.adoptNode(element);
    if (old?.matches(".turn")) keep(old, live);
    if (old) old.replaceWith(live);
    else parent?.append(live);
    receive(live, html);
    if (focused !== null) (byId(focused) ?? live).focus({ preventScroll: true });
  }
  // A single turn has no title.
  if (page.title) document.title = page.title;
  if (atEnd) scrollTo(0, document.body.scrollHeight);
}

// Keeps unsent text when something else in its turn changes.
function keep(old, live) {
  for (const field of old.querySelectorAll("details :is(input, textarea)[id]")) {
    const fresh = live.querySelector(`#${CSS.escape(field.id)}`);
    if (!fresh || field.value === field.defaultValue || field.form.dataset.sending) continue;
    fresh.value = field.value;
    fresh.closest("details").open = true;
  }
}

function receive(element, html) {
  sent.set(element, html);
  localize(element);
}

function localize(part) {
  for (const time of part.querySelectorAll("time"))
    time.textContent = new Date(time.dateTime).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

function notice(text, { passes = false } = {}) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
  passing = passes;
}

function say(text) {
  byId("status").textContent = text;
}

// Requests a page. On failure shows a notice and returns no `page`; if the failure may be temporary, returns null and
// schedules a refresh.
async function load(url, options) {
  clearTimeout(retry);
  try {
    const response = await fetch(url, options);
    const page = parse(await response.text());
    if (response.ok) return { page, url: response.url };
    const words = page.getElementById("notice")?.textContent ?? `The page failed (${response.status}).`;
    notice(words, { passes: !options || response.status === 503 });
    if (response.status < 500) return {};
  } catch {
    notice(AWAY, { passes: true });
  }
  retry = setTimeout(refresh, RETRY_MS);
  return null;
}

async function refresh() {
  const before = actions;
  const loaded = await load(location.href);
  if (!loaded?.page || actions !== before) return;
  // The user has been signed out.
  if (new URL(loaded.url).pathname !== location.pathname) return location.assign(loaded.url);
  if (passing) notice("");
  place(loaded.page);
  follow();
}

async function submit(form, button) {
  // Ignore further presses until the first one is answered.
  if (form.dataset.sending) return;
  form.dataset.sending = "true";
  const composing = form.id === "composer";
  const message = byId("message")?.value;
  if (composing) say("Sent.");
  const body = new URLSearchParams(new FormData(form, button));
  actions += 1;
  const loaded = await load(form.action, { method: "POST", body });
  // If a message that got no response is sent again unchanged, it keeps its request id.
  if (composing) unanswered = loaded ? null : message;
  if (!loaded?.page) {
    delete form.dataset.sending;
    // Rejected: show the current state.
    return loaded && refresh();
  }
  notice("");
  if (composing) {
    // Text written in the meantime is the next message.
    if (byId("message").value === message) form.reset();
    if (form.contains(document.activeElement) || document.activeElement === document.body) byId("message").focus();
  }
  if (loaded.url !== location.href) history.pushState(null, "", loaded.url);
  place(loaded.page);
  delete form.dataset.sending;
  if (composing) scrollTo(0, document.body.scrollHeight);
  follow();
}

// Follows answers while they are written. Each event is the whole turn, so a lost event does no harm.
function follow() {
  if (following || !document.querySelector("[aria-busy=true]")) return;
  say("The answer is being written.");
  following = new EventSource(`${location.pathname}/answer`);
  const end = () => {
    following.close();
    following = null;
    refresh();
  };
  following.addEventListener("open", () => passing && notice(""));
  following.addEventListener("turn", (event) => place(parse(event.data)));
  following.addEventListener("end", () => {
    say("The answer has ended.");
    end();
  });
  following.addEventListener("error", () => {
    if (following.readyState === EventSource.CLOSED) end();
    else notice(AWAY, { passes: true });
  });
}

document.addEventListener("submit", (event) => {
  if (!event.target.matches("[data-stay]")) return;
  event.preventDefault();
  submit(event.target, event.submitter);
});

// The second click of a double click is not a second vote.
document.addEventListener(
  "click",
  (event) => {
    if (event.detail > 1 && event.target.closest("button")) event.preventDefault();
  },
  true,
);

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.repeat && key === "Enter" && target.matches("button")) return event.preventDefault();
  // 229: Safari's key code for the Enter that ends an input method's composition.
  if (event.isComposing || event.keyCode === 229 || event.ctrlKey || event.altKey || event.metaKey) return;
  // Phone keyboards have no Shift+Enter, so there Enter starts a new line and the button sends.
  if (target.id === "message" && key === "Enter" && !event.shiftKey && !matchMedia("(pointer: coarse)").matches) {
    event.preventDefault();
    if (!event.repeat && target.value.trim()) byId("composer").requestSubmit(byId("send"));
  } else if (!target.matches("input, textarea")) {
    // A key can come before the browser has moved the focus to the page's only pair.
    const pair = target === document.body ? document.querySelector(".pair[autofocus]") : target.closest(".pair");
    pair?.querySelector(`[aria-keyshortcuts="${CSS.escape(key)}"]`)?.click();
  }
});

// The same user may have voted in another window.
document.addEventListener("visibilitychange", () => document.hidden || refresh());
addEventListener("popstate", () => location.reload());

for (const element of document.querySelectorAll("[data-live]")) receive(element, element.outerHTML);
localize(document);
if (byId("turns")) {
  scrollTo(0, document.body.scrollHeight);
  follow();
}
const seconds = Number(document.body.dataset.refresh);
if (seconds) setInterval(() => document.hidden || refresh(), seconds * 1000);

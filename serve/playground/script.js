// The playground: asks this server's API and shows what comes, as text nodes alone.

const $ = (id) => document.getElementById(id);
const EXPERT_STYLES = 8;
const FRAME_MS = 500;
const KEY = "yan-key";
const THEME = "yan-theme";
let cards = [];
let snapshots = [];
let running = null; // AbortController of the request under way
let player = 0;

/** An element with a class and text. */
function make(name, className = "", text = "") {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

const ms = (value) => `${value.toFixed(value < 10 ? 2 : 1)} ms`;
const card = () => cards.find((one) => one.id === $("model").value);
const freely = () => document.querySelector("input[name=mode]:checked").value === "source";

/** What the API refused, in its own words. */
class Refused extends Error {
  constructor(error, status, retryAfter) {
    super(error?.message ?? `the server answered with status ${status}`);
    this.param = error?.param;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** A response that is well, else a `Refused`. */
async function call(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const response = await fetch(path, { ...options, headers, signal });
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Refused(told.error, response.status, response.headers.get("Retry-After"));
}

/** Server-sent events of a response, as [name, data]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const [name, data] = part.split("\n");
      yield [name.slice("event: ".length), JSON.parse(data.slice("data: ".length))];
    }
  }
}

// --- the form --------------------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    cards = (await (await call("v1/models")).json()).data;
  } catch (error) {
    tell(error);
    $("status").textContent = "No models yet.";
    return false;
  }
  const tasks = [...new Set(cards.map((one) => one.task))];
  $("task").replaceChildren(...tasks.map((task) => new Option(task.replaceAll("_", " "), task)));
  chooseTask();
  clearError();
  $("status").textContent = `${cards.length} ${cards.length === 1 ? "model is" : "models are"} loaded.`;
  return true;
}

function chooseTask() {
  const those = cards.filter((one) => one.task === $("task").value);
  those.sort((a, b) => (a.architecture !== "yan") - (b.architecture !== "yan")); // YAN first, else the server's order
  $("model").replaceChildren(...those.map((one) => new Option(one.id, one.id)));
  chooseModel();
}

/** The task's fields as they are written. */
function written() {
  return Object.fromEntries([...$("fields").querySelectorAll("textarea")].map((box) => [box.name, box.value]));
}

function chooseModel() {
  const chosen = card();
  const before = written();
  $("fields").replaceChildren(
    ...chosen.fields.map((name) => {
      const label = make("label", "", name.replaceAll("_", " "));
      const box = make("textarea");
      box.name = name;
      box.rows = 2;
      box.value = before[name] ?? "";
      label.append(box);
      return label;
    }),
  );
  const baseline = chosen.architecture !== "yan";
  for (const id of ["num_steps", "guidance_scale", "num_candidates"]) $(id).disabled = baseline;
  $("baseline-hint").hidden = !baseline;
  const [yan, ar] = racers();
  $("race").disabled = !(yan && ar);
  $("race-hint").textContent =
    yan && ar ? `${yan.id} against ${ar.id}` : "A race needs a YAN and an AR baseline of this task.";
}

function racers() {
  const those = cards.filter((one) => one.task === $("task").value);
  const chosen = card();
  const pick = (kind) => (chosen?.architecture === kind ? chosen : those.find((one) => one.architecture === kind));
  return [pick("yan"), pick("ar")];
}

function showMode() {
  $("free").hidden = !freely();
  $("fields").hidden = freely();
}

/** The request for a model; the API's defaults stand for what is left empty. */
function request(model) {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const body = { model: model.id, seed: number("seed") };
  if (freely()) body.source = $("source").value;
  else body.fields = written();
  if (model.architecture === "yan") {
    body.num_steps = number("num_steps");
    body.guidance_scale = number("guidance_scale");
    body.num_candidates = number("num_candidates");
  }
  return body;
}

// --- errors ----------------------------------------------------------------------------------------------------------

function clearError() {
  $("error").hidden = true;
  for (const marked of document.querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
}

function tell(error) {
  if (error.name === "AbortError") return;
  const known = error instanceof Refused;
  let text = known ? error.message : `The server cannot be reached (${error.message}).`;
  if (known && error.param && !text.includes(error.param)) text += ` (${error.param})`;
  if (known && error.retryAfter) text += `. Try again in ${error.retryAfter} s.`;
  if (known && error.status === 401 && !sessionStorage.getItem(KEY)) text = "a key is wanted: enter it under Key";
  $("error").textContent = text;
  $("error").hidden = false;
  $("status").textContent = "";
  reveal();
  if (known && error.status === 401) {
    $("key-box").open = true;
    $("key").setAttribute("aria-invalid", "true");
    $("key").focus();
  } else if (error.param === "fields") {
    const boxes = [...$("fields").querySelectorAll("textarea")];
    for (const box of boxes.filter((one) => !one.value.trim())) box.setAttribute("aria-invalid", "true");
  } else if (error.param) {
    const input = $(error.param);
    if (input && $("form").contains(input)) input.setAttribute("aria-invalid", "true");
  }
}

// --- an answer -------------------------------------------------------------------------------------------------------

function showTokens(snapshot) {
  const tokens = snapshot.pieces.flatMap((piece, i) => {
    const expert = snapshot.experts[i];
    if (expert === undefined) return [piece];
    // The space before a word has no colour: it would stay behind where a line ends.
    const start = piece.trim() ? piece.length - piece.trimStart().length : 0;
    const token = make("span", `token e${expert % EXPERT_STYLES}`, piece.slice(start));
    token.dataset.expert = expert;
    token.title = `expert ${expert}`;
    return [piece.slice(0, start), token];
  });
  $("answer").replaceChildren(...tokens);
}

function showLegend() {
  const last = snapshots.at(-1) ?? { experts: [], pieces: [] };
  const all = new Set(snapshots.flatMap((one) => one.experts));
  $("legend").replaceChildren(
    ...[...all].sort((a, b) => a - b).map((expert) => {
      const item = make("li");
      const mark = make("span", `token e${expert % EXPERT_STYLES}`, "expert");
      mark.dataset.expert = expert;
      const pieces = last.pieces.filter((_, i) => last.experts[i] === expert);
      const silent = pieces.filter((piece) => !piece).length; // part of a letter or of a space
      const note = silent ? `, ${silent} without text` : "";
      item.append(mark, ` ${pieces.length} ${pieces.length === 1 ? "token" : "tokens"}${note}`);
      return item;
    }),
  );
}

function showSnapshot(index) {
  const snapshot = snapshots[index];
  showTokens(snapshot);
  $("t").value = index;
  const t = snapshot.t.toFixed(2);
  $("t-shown").textContent = `t = ${t}`;
  $("t").setAttribute("aria-valuetext", `t = ${t}, step ${snapshot.step} of ${snapshots.length}: ${snapshot.text}`);
}

function addSnapshot(snapshot) {
  snapshots.push(snapshot);
  $("t").max = snapshots.length - 1;
  $("replay").hidden = false;
  showSnapshot(snapshots.length - 1);
  reveal();
}

function showAnswer(answer, roundTripMs) {
  if (answer.trajectory) answer.trajectory.forEach(addSnapshot);
  if (!snapshots.length) $("answer").textContent = answer.text;
  if (answer.text === "") $("answer").textContent = "(an empty text)";
  showLegend();
  const { timings, source_tokens_cut: cut } = answer;
  const rows = [
    ["Latency", ms(answer.latency_ms)],
    ["Round trip", ms(roundTripMs)],
    ["Queue", ms(timings.queue_ms)],
    ["Tokenise", ms(timings.tokenise_ms)],
    ["Sample", ms(timings.sample_ms)],
    ["Decode", ms(timings.decode_ms)],
    ["Passes", String(answer.nfe)],
    ["Source", `${answer.source_tokens} tokens${cut ? `, ${cut} cut off` : ""}`],
  ];
  $("times").replaceChildren(
    ...rows.map(([name, value]) => {
      const row = make("div");
      row.append(make("dt", "", name), make("dd", "", value));
      return row;
    }),
  );
  const several = answer.candidates ?? [];
  $("candidates-box").hidden = !several.length;
  $("candidates").replaceChildren(
    ...several.map((one) => {
      const item = make("li", "", one.text || "(an empty text)");
      item.append(make("span", "", `score ${one.score.toFixed(3)}`));
      return item;
    }),
  );
  reveal();
  $("status").textContent = `${answer.model} answered in ${ms(answer.latency_ms)}.`;
}

/** Bring the answer into sight, which on a phone is below the form. */
function reveal() {
  const section = $("status").parentElement;
  if (section.getBoundingClientRect().top > innerHeight / 2) section.scrollIntoView();
}

function begin() {
  running?.abort();
  running = new AbortController();
  clearInterval(player);
  snapshots = [];
  clearError();
  for (const id of ["result", "race-box", "replay", "candidates-box"]) $(id).hidden = true;
  $("t").max = 0;
  $("answer").classList.remove("forming");
  for (const id of ["answer", "legend", "times", "candidates", "lanes", "verdict"]) $(id).replaceChildren();
  $("status").textContent = "Asking.";
  return running.signal;
}

async function ask() {
  if (!cards.length && !(await loadModels())) return;
  const model = card();
  const body = request(model);
  const signal = begin();
  if (model.architecture === "yan") {
    // Which of several candidates is the best shows at the end: there is no stream of them.
    if (body.num_candidates > 1) body.trajectory = true;
    else body.stream = true;
  }
  const begun = performance.now();
  try {
    const response = await call("v1/generate", body, signal);
    $("result").hidden = false;
    $("answer").classList.add("forming");
    $("answer").setAttribute("aria-busy", "true"); // read out once it is whole
    if (!body.stream) return showAnswer(await response.json(), performance.now() - begun);
    for await (const [name, data] of events(response)) {
      if (signal.aborted) return;
      if (name === "step") addSnapshot(data);
      else if (name === "answer") return showAnswer(data, performance.now() - begun);
      else throw new Refused(data.error, 200, null);
    }
    throw new Refused({ message: "the answer broke off" }, 200, null);
  } catch (error) {
    if (signal.aborted) return; // the page belongs to a later request
    if (!snapshots.length) $("result").hidden = true;
    tell(error);
  } finally {
    if (!signal.aborted) {
      $("answer").classList.remove("forming");
      $("answer").removeAttribute("aria-busy");
    }
  }
}

function replay() {
  clearInterval(player);
  let index = 0;
  showSnapshot(index);
  player = setInterval(() => {
    index += 1;
    if (index >= snapshots.length) clearInterval(player);
    else showSnapshot(index);
  }, FRAME_MS);
}

// --- the race --------------------------------------------------------------------------------------------------------

async function runLane(model, signal) {
  const lane = make("div", "lane");
  const clock = make("div", "clock", ms(0));
  const text = make("p", "lane-text");
  const note = make("p", "hint", "decoding");
  lane.append(make("h3", "", model.id), clock, text, note);
  $("lanes").append(lane);
  const body = request(model);
  if (model.architecture === "yan") body.num_candidates = 1;
  const begun = performance.now();
  const tick = setInterval(() => (clock.textContent = ms(performance.now() - begun)), 50);
  try {
    const answer = await (await call("v1/generate", body, signal)).json();
    clearInterval(tick);
    clock.textContent = ms(performance.now() - begun);
    text.textContent = answer.text || "(an empty text)";
    note.textContent = `decoded in ${ms(answer.timings.sample_ms)}, server ${ms(answer.latency_ms)} in all`;
    return answer;
  } catch (error) {
    note.textContent = "failed";
    throw error;
  } finally {
    clearInterval(tick);
  }
}

async function race() {
  const pair = racers();
  const signal = begin();
  $("race-box").hidden = false;
  const [yan, ar] = await Promise.allSettled(pair.map((model) => runLane(model, signal)));
  if (signal.aborted) return;
  const failed = [yan, ar].find((one) => one.status === "rejected");
  if (failed) return tell(failed.reason);
  const [first, second] = [yan.value, ar.value].sort((a, b) => a.timings.sample_ms - b.timings.sample_ms);
  const times = (second.timings.sample_ms / first.timings.sample_ms).toFixed(1);
  $("verdict").textContent =
    `${first.model} decoded ${times} times as fast. The clocks also count the wait for each other on a shared machine.`;
  $("status").textContent = "The race is over.";
  reveal();
}

// --- theme, key, events ----------------------------------------------------------------------------------------------

function showTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light" : "Dark"; // what it changes to
}

const system = matchMedia("(prefers-color-scheme: dark)");
const chosenTheme = () => sessionStorage.getItem(THEME);
showTheme(chosenTheme() ? chosenTheme() === "dark" : system.matches);
system.addEventListener("change", () => chosenTheme() || showTheme(system.matches));
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme !== "dark";
  sessionStorage.setItem(THEME, dark ? "dark" : "light");
  showTheme(dark);
});
function useKey() {
  sessionStorage.setItem(KEY, $("key").value.trim());
  loadModels();
}
$("use-key").addEventListener("click", useKey);
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.ctrlKey) return;
  event.preventDefault(); // the form would ask
  useKey();
});
$("task").addEventListener("change", chooseTask);
$("model").addEventListener("change", chooseModel);
$("num_steps").addEventListener("input", () => ($("steps-shown").textContent = $("num_steps").value));
for (const mode of document.querySelectorAll("input[name=mode]")) mode.addEventListener("change", showMode);
$("t").addEventListener("input", () => {
  clearInterval(player);
  showSnapshot(Number($("t").value));
});
$("play").addEventListener("click", replay);
$("race").addEventListener("click", race);
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  ask();
});
loadModels();

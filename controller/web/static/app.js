// The fleet's page: asks the API again whenever the controller says that something changed.
// Every value from outside enters the page as a text node.

import { ApiError, find, follow, overview, reports, signIn, signOut } from "./api.js";
import { MOST_SERIES, draw, points, psiMax } from "./plot.js";

const POLL_MS = 5000; // without events
const SETTLE_MS = 400; // a burst of events makes one refresh
const REPORTS = 120;

const $ = (id) => document.getElementById(id);
const history = new Map(); // device name -> its reports
let state = null;
let unfollow = null; // ends the events of the signed-in time; null: not signed in
let timer = 0;
let refreshing = false;
let due = false; // a refresh stands in the timer because of an event
let again = false;
let streaming = false;

function cell(content, { kind = "td", className = "", title = "" } = {}) {
  const element = document.createElement(kind);
  element.append(content ?? "");
  if (kind === "th") element.scope = "row";
  if (className) element.className = className;
  if (title) element.title = title;
  return element;
}

function code(text) {
  const element = document.createElement("code");
  element.textContent = text;
  return element;
}

function tone(word) {
  if (["Online", "UpToDate", "Complete", "Active"].includes(word)) return "good";
  if (["Error", "Halted", "Offline", "Quarantined"].includes(word)) return "bad";
  return ["Updating", "Progressing", "Paused", "OutOfDate", "Held", "Degraded"].includes(word) ? "warn" : "";
}

function pill(word) {
  const element = document.createElement("span");
  element.className = `pill ${tone(word)}`;
  element.textContent = word || "—";
  return element;
}

function age(seconds) {
  if (!Number.isFinite(seconds) || seconds <= 0) return "never";
  const past = Math.max(0, Date.now() / 1000 - seconds);
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "m"]]) if (past >= size) return `${Math.floor(past / size)} ${unit} ago`;
  return `${Math.floor(past)} s ago`;
}

const byName = (a, b) => a.metadata.name.localeCompare(b.metadata.name);
const short = (digest) => (digest || "").slice(0, 12);
const running = (device) => Object.entries(device.status?.slots || {}).sort().filter(([, slot]) => slot.running);

function list(name, items, rows) {
  $(name).replaceChildren(...rows);
  $(`${name}-count`).textContent = items.length ? `(${items.length})` : "";
  $(`${name}-empty`).hidden = items.length > 0;
}

function stateOf(status) {
  const view = document.createDocumentFragment();
  view.append(pill(status.state));
  for (const { type, status: held, message } of status.conditions || []) {
    const mark = pill(held === "True" ? type : `${type}=${held}`);
    mark.classList.add("warn");
    mark.title = message || "";
    view.append(" ", mark);
  }
  for (const { slot, by, reason, since, until } of status.holds || []) {
    const mark = pill(`${slot ? `${slot}: ` : ""}held by ${by || "nobody known"}`);
    mark.classList.add("warn");
    const ends = until ? `, until ${new Date(until * 1000).toLocaleString()}` : "";
    mark.title = `${reason} (since ${new Date(since * 1000).toLocaleString()}${ends})`;
    view.append(" ", mark);
  }
  return view;
}

function shadowLine({ shadow }) {
  if (!shadow) return "";
  const psi = Number.isFinite(shadow.psi) ? `, PSI ${shadow.psi.toFixed(3)}` : "";
  const why = shadow.reason ? `: ${shadow.reason}` : "";
  return `shadow ${short(shadow.digest)} ${shadow.state}, ${shadow.agreed} of ${shadow.seen} agreed${psi}${why}`;
}

function deviceRow(device) {
  const { metadata, spec, status = {} } = device;
  const row = document.createElement("tr");
  const slots = running(device);
  const problem = Object.values(status.slots || {}).filter((slot) => slot.reason && slot.phase !== "Active");
  const psi = psiMax(history.get(metadata.name)?.at(-1));
  const models = slots.map(([name, slot]) => `${name === "default" ? "" : `${name}=`}${slot.running.model}:${slot.running.version}`);
  row.append(
    cell(metadata.name, { kind: "th" }),
    cell(spec.site),
    cell(pill(spec.revoked ? "Revoked" : status.connection || "Unseen")),
    cell(stateOf(status), { title: problem.map((slot) => `${slot.reason}: ${slot.message}`).join("\n") }),
    cell(models.join(", ") || "—", { title: Object.values(status.slots || {}).map(shadowLine).filter(Boolean).join("\n") }),
    cell(code(slots.map(([, slot]) => short(slot.running.digest)).join(", "))),
    cell(psi === null ? "—" : psi.toFixed(3), { className: `number ${psi > 0.25 ? "bad" : ""}` }),
    cell(age(status.lastSeen)),
  );
  return row;
}

function text(kind, content, className = "") {
  const element = document.createElement(kind);
  element.textContent = content;
  if (className) element.className = className;
  return element;
}

function rolloutView({ metadata, spec, status = {} }, open) {
  const view = text("article", "", "rollout");
  view.dataset.name = metadata.name;
  const head = text("div", "", "row");
  head.append(text("h3", metadata.name), pill(status.phase || "Pending"));
  head.append(text("span", `${spec.model}:${spec.version} to ${spec.fleet}, ${status.updated ?? 0}/${status.devices ?? 0} devices`));
  view.append(head);
  if (status.reason) view.append(text("p", [status.reason, status.message].filter(Boolean).join(": "), tone(status.phase)));
  const waves = text("ul", "", "waves");
  (status.waves || []).forEach((wave, index) => {
    const verdict = wave.passedAt ? "passed" : `${wave.succeeded} ok, ${wave.failed} failed`;
    const item = text("li", `wave ${index + 1}: ${wave.devices.length} devices, ${verdict}`, wave.failed ? "bad" : wave.passedAt ? "good" : "");
    item.title = wave.devices.join(", ");
    waves.append(item);
  });
  if (waves.children.length) view.append(waves);
  const events = status.timeline || [];
  if (events.length) {
    const details = text("details", "");
    details.open = open;
    details.append(text("summary", `Timeline (${events.length})`));
    const lines = text("ol", "", "timeline");
    for (const event of events.slice(-50)) {
      const measured = Number.isFinite(event.measured) ? ` (measured ${event.measured}, limit ${event.limit ?? "—"})` : "";
      const where = [`wave ${(event.wave ?? 0) + 1}`, event.device].filter(Boolean).join(", ");
      lines.append(text("li", `${new Date(event.at * 1000).toLocaleTimeString()} ${where}: ${event.reason}: ${event.message}${measured}`));
    }
    details.append(lines);
    view.append(details);
  }
  return view;
}

function versionRow({ spec }, devices) {
  const row = document.createElement("tr");
  const on = devices.filter((device) => running(device).some(([, slot]) => slot.running.digest === spec.digest));
  const metrics = Object.entries(spec.manifest?.metrics || {}).slice(0, 4);
  row.append(
    cell(spec.model, { kind: "th" }),
    cell(String(spec.version), { className: "number" }),
    cell(code(short(spec.digest)), { title: spec.digest }),
    cell(spec.manifest?.lineage?.recipe || "—"),
    cell(metrics.map(([name, value]) => `${name} ${Number(value).toPrecision(3)}`).join(", ") || "—"),
    cell(`${on.length} devices`, { title: on.map((device) => device.metadata.name).join(", ") }),
  );
  return row;
}

function showPlot() {
  const metric = $("metric").value;
  const wanted = $("plot-device").value;
  const names = state.devices.map((device) => device.metadata.name).filter((name) => !wanted || name === wanted);
  const series = names.map((name) => ({ name, points: points(history.get(name) || [], metric) }));
  $("plot-caption").textContent = draw($("plot"), $("legend"), series, metric);
}

function show() {
  const { devices, rollouts, versions } = state;
  list("devices", devices, devices.map(deviceRow));
  list("versions", versions, versions.map((version) => versionRow(version, devices)));
  const shut = new Set([...document.querySelectorAll(".rollout details:not([open])")].map((d) => d.closest(".rollout").dataset.name));
  list("rollouts", rollouts, rollouts.map((rollout) => rolloutView(rollout, !shut.has(rollout.metadata.name))));
  const chosen = $("plot-device").value;
  const options = devices.map(({ metadata }) => new Option(metadata.name, metadata.name, false, metadata.name === chosen));
  $("plot-device").replaceChildren(new Option("all devices", ""), ...options);
  showPlot();
}

function link(word, className) {
  $("link").textContent = word;
  $("link").className = `pill ${className}`;
}

function trouble(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

function soon() {
  if (refreshing) {
    again = true;
    return;
  }
  if (due) return; // a steady stream of events must not push the refresh away
  due = true;
  clearTimeout(timer);
  timer = setTimeout(refresh, SETTLE_MS);
}

async function refresh() {
  if (refreshing) {
    again = true;
    return;
  }
  refreshing = true;
  due = false;
  clearTimeout(timer);
  try {
    const { devices, rollouts, modelVersions } = await overview();
    // A version never changes: its manifest is asked for only when there is a new one.
    const known = new Set((state?.versions || []).map((version) => version.metadata.name));
    const same = modelVersions.length === known.size && modelVersions.every((version) => known.has(version.name));
    const versions = same ? state?.versions || [] : await find("modelversions");
    devices.sort(byName);
    versions.sort((a, b) => a.spec.model.localeCompare(b.spec.model) || b.spec.version - a.spec.version);
    rollouts.sort((a, b) => (b.metadata.creationTimestamp || 0) - (a.metadata.creationTimestamp || 0));
    const wanted = $("plot-device").value;
    const drawn = devices.filter((device, index) => index < 3 * MOST_SERIES || device.metadata.name === wanted);
    await Promise.all(drawn.map(async ({ metadata }) => history.set(metadata.name, await reports(metadata.name, REPORTS))));
    if (!unfollow) return;
    state = { devices, rollouts, versions };
    trouble("");
    link(streaming ? "live" : "polling", streaming ? "good" : "warn");
    $("login").hidden = true;
    $("fleet").hidden = false;
    show();
  } catch (error) {
    failed(error);
  } finally {
    refreshing = false;
    if (unfollow) {
      clearTimeout(timer);
      due = again;
      timer = setTimeout(refresh, again ? SETTLE_MS : POLL_MS);
    }
    again = false;
  }
}

function failed(error) {
  if (!unfollow) return;
  if (error instanceof ApiError && (error.status === 401 || error.status === 403)) {
    stop(`The session has ended: ${error.message}`);
    return;
  }
  link("disconnected", "bad");
  trouble(state ? `${error.message}. What is shown is the last known state; trying again.` : `${error.message}; trying again.`);
  $("fleet").hidden = false;
  $("login").hidden = true;
}

function start() {
  $("logout").hidden = false;
  link("connecting", "");
  unfollow = follow(
    () => {
      streaming = true;
      soon();
    },
    soon,
    () => {
      if (streaming) soon();
      streaming = false;
    },
  );
  refresh();
}

function stop(message) {
  unfollow?.();
  unfollow = null;
  state = null;
  streaming = false;
  due = false;
  clearTimeout(timer);
  history.clear();
  $("logout").hidden = true;
  $("fleet").hidden = true;
  $("login").hidden = false;
  $("login-error").textContent = message;
  $("token").value = "";
  $("token").focus();
  link("not signed in", "");
}

$("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("login-error").textContent = "";
  try {
    await signIn($("token").value.trim());
  } catch (error) {
    stop(error.message);
    return;
  }
  $("token").value = "";
  start();
});
$("logout").addEventListener("click", async () => {
  await signOut().catch(() => {});
  stop("");
});
$("metric").addEventListener("change", () => state && showPlot());
$("plot-device").addEventListener("change", () => state && refresh());

// A session of before may still be valid.
overview().then(start, (error) => {
  if (error.status === 401 || error.status === 403) stop("");
  else start();
});

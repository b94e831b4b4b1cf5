// One SVG line plot, drawn again from scratch on every change. Values enter as text nodes and numbers only.

const SVG = "http://www.w3.org/2000/svg";
const BOX = { left: 56, right: 890, top: 12, bottom: 228 };
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
export const MOST_SERIES = 8;

function shape(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function largest(psi) {
  const values = Object.values(psi || {}).filter(Number.isFinite);
  return values.length ? Math.max(...values) : null;
}

export function psiMax(report) {
  const values = (report?.streams || []).map((stream) => largest(stream.psi)).filter((value) => value !== null);
  return values.length ? Math.max(...values) : null;
}

export const METRICS = {
  alarms: {
    label: "alarms per row",
    of(report) {
      const rows = report.streams.reduce((sum, stream) => sum + stream.rows, 0);
      return rows ? report.streams.reduce((sum, stream) => sum + stream.alarms, 0) / rows : null;
    },
  },
  psi: { label: "population stability index, largest feature", of: psiMax },
  score: {
    label: "mean score",
    of(report) {
      const scored = report.streams.filter((stream) => Number.isFinite(stream.score_mean) && stream.rows);
      const rows = scored.reduce((sum, stream) => sum + stream.rows, 0);
      return rows ? scored.reduce((sum, stream) => sum + stream.score_mean * stream.rows, 0) / rows : null;
    },
  },
};

// `reports` of one device as points {at, value}, where the metric has a value.
export function points(reports, metric) {
  return reports
    .map((report) => ({ at: report.at, value: METRICS[metric].of(report) }))
    .filter((point) => Number.isFinite(point.at) && Number.isFinite(point.value));
}

function tick(value, span) {
  return value.toFixed(span >= 50 ? 0 : span >= 5 ? 1 : span >= 0.5 ? 2 : 3);
}

function style(index) {
  return { class: `series tone-${index % 8}`, "stroke-dasharray": DASHES[Math.floor(index / 2) % 4] };
}

// `series` is [{name, points}]. Returns the sentence that says what is seen.
export function draw(svg, legend, series, metric) {
  const shown = series.filter((one) => one.points.length).slice(0, MOST_SERIES);
  const all = shown.flatMap((one) => one.points);
  legend.replaceChildren();
  if (!all.length) {
    svg.replaceChildren(shape("text", { x: 450, y: 130, "text-anchor": "middle" }, "no reports with this figure yet"));
    return `No data for ${METRICS[metric].label} yet.`;
  }
  const times = all.map((point) => point.at);
  const values = all.map((point) => point.value);
  const [from, to] = [Math.min(...times), Math.max(...times)];
  const low = Math.min(0, ...values);
  let high = Math.max(...values);
  if (high <= low) high = low + 1;
  const x = (at) => (to === from ? BOX.right : BOX.left + ((at - from) / (to - from)) * (BOX.right - BOX.left));
  const y = (value) => BOX.bottom - ((value - low) / (high - low)) * (BOX.bottom - BOX.top);
  const parts = [];
  for (let step = 0; step <= 4; step += 1) {
    const value = low + ((high - low) * step) / 4;
    parts.push(shape("line", { class: "axis", x1: BOX.left, x2: BOX.right, y1: y(value), y2: y(value) }));
    parts.push(shape("text", { x: BOX.left - 6, y: y(value) + 4, "text-anchor": "end" }, tick(value, high - low)));
  }
  const clock = (at) => new Date(at * 1000).toLocaleTimeString();
  parts.push(shape("text", { x: BOX.left, y: 248 }, clock(from)));
  parts.push(shape("text", { x: BOX.right, y: 248, "text-anchor": "end" }, clock(to)));
  shown.forEach((one, index) => {
    const path = one.points.map((p, i) => `${i ? "L" : "M"}${x(p.at).toFixed(1)},${y(p.value).toFixed(1)}`).join("");
    parts.push(shape("path", { ...style(index), d: one.points.length > 1 ? path : `${path}h0.1` }));
    const item = document.createElement("li");
    const swatch = shape("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" });
    swatch.append(shape("path", { ...style(index), d: "M0,4H26" }));
    const last = one.points.at(-1).value;
    item.append(swatch, `${one.name}: ${tick(last, high - low)}`);
    legend.append(item);
  });
  svg.replaceChildren(...parts);
  const left = series.filter((one) => one.points.length).length - shown.length;
  return `${METRICS[metric].label}, per device, ${clock(from)} to ${clock(to)}${left > 0 ? `; ${left} more devices are not drawn, choose one above` : ""}.`;
}

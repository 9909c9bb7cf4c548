/** The study that the page is of, what is chosen of it, and how its values are written. */
const study = JSON.parse(document.getElementById("data").textContent);
const trials = study.rows.map((values, index) => ({
  ...study.shared,
  ...Object.fromEntries(study.keys.map((key, i) => [key, values[i]])),
  front: false,
  index,
}));
const frontRows = study.front.map((index) => trials[index]);
for (const row of frontRows) row.front = true;
const labels = study.labels;
const isConfirmed = (row) => Boolean(row.rounds);

const element = (id) => document.getElementById(id);

function html(name, text, parent, className) {
  const made = document.createElement(name);
  if (text !== null) made.textContent = text;
  if (className) made.className = className;
  if (parent) parent.append(made);
  return made;
}

/** A number of an axis, or a value with no more digits than are known. */
function show(value, decimals) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (decimals === undefined) return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
  const text = value.toFixed(decimals);
  return Number(text) === 0 ? text.replace("-", "") : text;
}

/** The value of a row, to the digit where its interval begins to matter, and the interval; as in tables/columns.py. */
function written(row, key) {
  const low = row[`${key}_low`], high = row[`${key}_high`];
  const hasInterval = study.intervals.includes(key) && typeof low === "number" && typeof high === "number" && low !== high;
  if (!hasInterval) return [show(row[key], study.decimals[key]), ""];
  const decimals = intervalDecimals(low, high, study.decimals[key]);
  return [show(row[key], decimals), `[${show(low, decimals)}, ${show(high, decimals)}]`];
}

function intervalDecimals(low, high, otherwise) {
  const half = (high - low) / 2;
  if (!(half > 0)) return otherwise;
  const [mantissa, exponent] = half.toExponential(2).split("e");
  return Math.max((Number(mantissa) < 3.55 ? 1 : 0) - Number(exponent), 0);
}

/** The row that is pinned, and the one that is pointed at; whoever shows them is told when they change. */
const chosen = {
  pinned: null,
  pointed: null,
  watchers: [],
  changed() {
    for (const watcher of chosen.watchers) watcher();
  },
  point(row) {
    if (row === chosen.pointed) return;
    chosen.pointed = row;
    chosen.changed();
  },
  pin(row) {
    chosen.pinned = chosen.pinned === row ? null : row;
    chosen.changed();
  },
};

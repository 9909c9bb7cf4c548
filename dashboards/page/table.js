/** The table of all trials: sorted, filtered by a condition, in pages; and what each row was made by. */
const table = (() => {
  const PAGE = 50;
  const columns = [...Object.keys(study.shared), ...study.keys, "front"];
  const hasNotes = trials.some((row) => noteOf(row));
  let order = { key: "trial", up: true };
  let page = 0;
  let open = null; // the row whose sources are shown
  let isMet = () => true;

  function noteOf(row) {
    return row.reason || row.violated || row.warning || "";
  }

  function compare(a, b) {
    const one = a[order.key], other = b[order.key];
    const missing = (value) => value === null || value === undefined;
    if (missing(one) || missing(other)) return missing(one) - missing(other);
    const sign = order.up ? 1 : -1;
    return sign * ((one > other) - (one < other));
  }

  /** The condition in the box; what is wrong with it is said below, and the rows stay as they were. */
  function read() {
    const text = element("filter").value.trim();
    const problem = element("problem");
    problem.textContent = "";
    element("filter").removeAttribute("aria-invalid");
    try {
      isMet = text ? conditions.condition(text, columns, study.known) : () => true;
    } catch (error) {
      if (!(error instanceof conditions.ConditionError)) throw error;
      problem.textContent = `${error.message}; write for example ${study.example}`;
      element("filter").setAttribute("aria-invalid", "true");
    }
  }

  function draw() {
    const found = trials.filter(isMet).sort(compare);
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(page, pages - 1);
    const first = page * PAGE;
    element("count").textContent = found.length
      ? `${first + 1} to ${Math.min(first + PAGE, found.length)} of ${found.length} trials`
      : "no trial";
    element("previous").disabled = page === 0;
    element("next").disabled = page === pages - 1;
    const body = element("all").tBodies[0];
    body.replaceChildren();
    for (const row of found.slice(first, first + PAGE)) body.append(...lines(row));
    for (const head of element("all").tHead.rows[0].cells) {
      if (!head.dataset.key) continue;
      const sorted = head.dataset.key === order.key ? (order.up ? "ascending" : "descending") : "none";
      head.setAttribute("aria-sort", sorted);
      head.firstChild.textContent = head.dataset.label + { ascending: " ▲", descending: " ▼", none: "" }[sorted];
    }
    call();
  }

  function lines(row) {
    const line = html("tr", null, null, [row.front ? "on-front" : "", row === chosen.pinned ? "pinned" : ""].join(" ").trim());
    const name = html("td", null, line, "trial");
    const button = html("button", show(row.trial), name);
    button.type = "button";
    button.title = "pin it in the chart";
    button.addEventListener("click", () => chosen.pin(row));
    if (row.front) {
      const mark = html("span", row.index === study.recommended ? "★" : "◆", name, "mark");
      mark.title = row.index === study.recommended ? "on the front, recommended" : "on the front";
    }
    for (const key of study.table) {
      const [value, ends] = written(row, key);
      const cell = html("td", value, line, typeof row[key] === "number" ? "number" : "");
      if (ends) cell.append(" ", html("span", ends, null, "interval"));
    }
    sources.fill(html("td", null, line, "sources"), row, () => {
      open = open === row ? null : row;
      draw();
    }, open === row);
    if (hasNotes) html("td", noteOf(row), line, "reason");
    if (open !== row) return [line];
    const more = html("tr", null, null, "more");
    const cell = html("td", null, more);
    cell.colSpan = line.cells.length;
    sources.describe(cell, row);
    return [line, more];
  }

  /** The Python call that gives the rows of the table, in its order. */
  function call() {
    const text = element("filter").value.trim();
    const which = text && !element("problem").textContent ? `study.select(${JSON.stringify(text)})` : "study.trials";
    const sorted = `.sort_values(${JSON.stringify(order.key)}, ascending=${order.up ? "True" : "False"}, kind="stable")`;
    const ends = (key) => [key, `${key}_low`, `${key}_high`].filter((name) => columns.includes(name));
    element("all-call").textContent = `${study.call}${which}${sorted}[${JSON.stringify(["trial", ...study.table.flatMap(ends)]).replaceAll(",", ", ")}]`;
  }

  function heads() {
    const line = html("tr", null, element("all").tHead);
    for (const key of ["trial", ...study.table]) {
      const isNumber = key !== "trial" && trials.some((row) => typeof row[key] === "number");
      const cell = html("th", null, line, isNumber ? "number" : "");
      cell.scope = "col";
      cell.dataset.key = key;
      cell.dataset.label = study.headings[key] || labels[key] || key;
      const button = html("button", cell.dataset.label, cell);
      button.type = "button";
      button.addEventListener("click", () => {
        order = { key, up: order.key === key ? !order.up : true };
        page = 0;
        draw();
      });
    }
    for (const text of ["source", ...(hasNotes ? ["failed, violates, warns"] : [])]) html("th", text, line).scope = "col";
  }

  function inCommon() {
    const keys = study.inCommon;
    const said = keys.map((key) => `${study.headings[key]} ${show(study.shared[key])}`);
    element("in-common").textContent = said.length ? `All trials have in common: ${said.join(", ")}.` : "";
  }

  function start() {
    heads();
    inCommon();
    element("filter").addEventListener("input", () => { page = 0; read(); draw(); });
    element("previous").addEventListener("click", () => { page -= 1; draw(); });
    element("next").addEventListener("click", () => { page += 1; draw(); });
    let pinned = null;
    chosen.watchers.push(() => {
      if (chosen.pinned === pinned) return;
      pinned = chosen.pinned;
      draw();
    });
    read(); // a browser may have kept what was in the box
    draw();
  }

  return { start };
})();

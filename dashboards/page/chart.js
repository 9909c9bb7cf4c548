/** The chart of all trials by two measures, and the panel beside it. */
const chart = (() => {
  const REACH = 18; // pixels: how near the pointer has to be
  const MOST_LABELS = 40;
  const MOST_AVOIDED = 300; // other trials that labels keep clear of
  const plot = element("plot");
  let plotted = [];
  let box = {};

  function svg(name, attributes, parent = plot) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent.append(made);
    return made;
  }

  /** A pixel is a pixel: text stays as large as it is on a narrow page. */
  function measure() {
    const width = Math.max(plot.clientWidth, 280);
    const height = Math.round(Math.min(Math.max(0.62 * width, 320), 480));
    box = { width, height, left: 58, right: width - 12, top: 12, bottom: height - 46 };
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    plot.style.height = `${height}px`;
  }

  const isNumber = (value) => typeof value === "number";
  const ends = (row, key) => [row[`${key}_low`], row[key], row[`${key}_high`]].filter(isNumber);

  function draw() {
    const x = element("x-axis").value, y = element("y-axis").value, all = element("everything").checked;
    measure();
    plot.replaceChildren();
    plotted = [];
    const rows = trials.filter((row) => row.state === "complete" && isNumber(row[x]) && isNumber(row[y]));
    if (!rows.length) {
      svg("text", { x: box.width / 2, y: box.height / 2, "text-anchor": "middle" }).textContent = "no trial has both of these measures";
      return;
    }
    const front = frontRows.filter((row) => isNumber(row[x]) && isNumber(row[y]));
    const [across, up] = [[x, "x-log"], [y, "y-log"]].map(([key, id]) =>
      scales.axis(rows.map((row) => row[key]), front.flatMap((row) => ends(row, key)), { all, log: element(id).checked }));
    const place = {
      x: (value) => box.left + clamp(across.at(value)) * (box.right - box.left),
      y: (value) => box.bottom - clamp(up.at(value)) * (box.bottom - box.top),
      covers: (row) => across.covers(row[x]) && up.covers(row[y]),
    };
    axes(x, y, across, up, place);
    band(x, y, place);
    baseline(x, y, across, up, place);
    plotted = rows.map((row) => ({ row, x: place.x(row[x]), y: place.y(row[y]), within: place.covers(row) }));
    const beyond = plotted.filter((mark) => !mark.within).length;
    element("beyond").textContent = beyond ? `${beyond} of ${rows.length} trials lie beyond the edge, at which they are marked` : "";
    otherMarks();
    whiskers(front, x, y, place, plot, "whiskers");
    frontMarks(x, y);
    svg("g", { id: "rings" });
    rings();
  }

  const clamp = (share) => Math.min(Math.max(share, 0), 1);

  function axes(x, y, across, up, place) {
    const lines = [];
    for (const value of across.ticks(Math.max(3, Math.floor(box.width / 80)))) {
      lines.push(`M${place.x(value)} ${box.top}V${box.bottom}`);
      svg("text", { x: place.x(value), y: box.bottom + 17, "text-anchor": "middle" }).textContent = show(value);
    }
    for (const value of up.ticks(6)) {
      lines.push(`M${box.left} ${place.y(value)}H${box.right}`);
      svg("text", { x: box.left - 6, y: place.y(value) + 4, "text-anchor": "end" }).textContent = show(value);
    }
    svg("path", { class: "grid", d: lines.join("") });
    const middle = (box.top + box.bottom) / 2;
    const title = (key, axis) => short(key) + (axis.note ? ` (${axis.note})` : "");
    svg("text", { x: (box.left + box.right) / 2, y: box.height - 8, "text-anchor": "middle" }).textContent = title(x, across);
    svg("text", { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }).textContent = title(y, up);
  }

  /** What nine of ten drawn fronts attain or miss, between two staircases, and the edge of what half of them attain. */
  function band(x, y, place) {
    const names = Object.keys(study.objectives);
    if (!study.band || x === y || !names.includes(x) || !names.includes(y)) return;
    const worstX = study.objectives[x] === "minimize" ? box.right : box.left;
    const worstY = study.objectives[y] === "minimize" ? box.top : box.bottom;
    const stairs = (corners) => {
      const places = (x === names[0] ? corners : corners.map(([a, b]) => [b, a]).reverse())
        .map(([a, b]) => [Number(place.x(a).toFixed(1)), Number(place.y(b).toFixed(1))])
        .filter(([px, py]) => px !== worstX && py !== worstY); // on the worst edges they say nothing
      if (!places.length) return `M${worstX} ${worstY}`;
      return `M${places[0][0]} ${worstY}${places.map(([px, py]) => `H${px}V${py}`).join("")}H${worstX}`;
    };
    const [hardly, half, surely] = study.band.map(stairs);
    const close = `V${worstY}Z`;
    svg("path", { class: "band", "fill-rule": "evenodd", d: hardly + close + surely + close });
    svg("path", { class: "half", d: half });
  }

  /** The whole label where there is room for it. */
  const short = (key) => (box.width < 600 ? study.headings[key] || labels[key] : labels[key]);

  function baseline(x, y, across, up, place) {
    const row = study.fixed.find((fixed) => fixed.trial === "baseline") || {};
    let path = "";
    if (isNumber(row[x]) && across.covers(row[x])) path += `M${place.x(row[x])} ${box.top}V${box.bottom}`;
    if (isNumber(row[y]) && up.covers(row[y])) path += `M${box.left} ${place.y(row[y])}H${box.right}`;
    svg("path", { class: "baseline", d: path });
  }

  /** One path for each kind, however many trials there are. */
  function otherMarks() {
    const kinds = { others: [], once: [], infeasible: [], edge: [] };
    for (const mark of plotted.filter(({ row }) => !row.front)) {
      const kind = !mark.within ? "edge" : mark.row.feasible === false ? "infeasible" : isConfirmed(mark.row) ? "others" : "once";
      kinds[kind].push([mark.x.toFixed(1), mark.y.toFixed(1)]);
    }
    const shapes = {
      others: "h0",
      once: "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0",
      infeasible: "m-3 -3l6 6m0 -6l-6 6",
      edge: "m-3 0h6m-3 -3v6",
    };
    for (const [kind, places] of Object.entries(kinds)) {
      svg("path", { class: kind, d: places.map(([px, py]) => `M${px} ${py}${shapes[kind]}`).join("") });
    }
  }

  function whiskers(rows, x, y, place, parent, className) {
    let path = "";
    for (const row of rows.filter(place.covers)) {
      const [left, , right] = ends(row, x), [low, , high] = ends(row, y);
      if (right !== undefined) path += `M${place.x(left)} ${place.y(row[y])}H${place.x(right)}`;
      if (high !== undefined) path += `M${place.x(row[x])} ${place.y(low)}V${place.y(high)}`;
    }
    svg("path", { class: className, d: path }, parent);
  }

  function frontMarks(x, y) {
    const marks = plotted.filter(({ row, within }) => row.front && within).sort((a, b) => a.x - b.x);
    const names = Object.keys(study.objectives);
    if (names.length === 2 && names.includes(x) && names.includes(y) && x !== y && marks.length) {
      // between two neighbours nothing better is known than the worse of the two: horizontal first where less is better
      const first = study.objectives[x] === "minimize" ? (m) => `H${m.x}V${m.y}` : (m) => `V${m.y}H${m.x}`;
      svg("path", { class: "stairs", d: `M${marks[0].x} ${marks[0].y}` + marks.slice(1).map(first).join("") });
    }
    marks.forEach((mark) => frontMark(mark, x, y));
    const isRecommended = ({ row }) => row.index === study.recommended;
    const named = [...marks].sort((a, b) => isRecommended(b) - isRecommended(a)).slice(0, MOST_LABELS)
      .map((mark) => ({ x: mark.x, y: mark.y, size: isRecommended(mark) ? 10 : 7, text: show(mark.row.trial) }));
    const others = plotted.filter(({ row }) => !row.front).slice(0, MOST_AVOIDED);
    scales.labelPlaces(named, others, box).forEach((found, i) => {
      if (found) svg("text", { class: "label", x: found[0], y: found[1] }).textContent = named[i].text;
    });
  }

  const DIAMOND = "m0 -7l7 7l-7 7l-7 -7z";
  const STAR = "m0 -11l3.2 7.2l7.8 .8l-5.9 5.2l1.7 7.7l-6.8 -4l-6.8 4l1.7 -7.7l-5.9 -5.2l7.8 -.8z";

  function frontMark({ row, x: px, y: py }, x, y) {
    const recommended = row.index === study.recommended;
    const shape = svg("path", {
      class: ["front", recommended ? "recommended" : "", isConfirmed(row) ? "" : "hollow"].join(" ").trim(),
      d: `M${px} ${py}${recommended ? STAR : DIAMOND}`,
      tabindex: 0,
      role: "button",
      "data-trial": row.trial,
      "aria-label": `${recommended ? "recommended, " : ""}trial ${row.trial}: ${labels[x]} ${written(row, x)[0]}, ${labels[y]} ${written(row, y)[0]}`,
    });
    shape.addEventListener("focus", () => chosen.point(row));
    shape.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      chosen.pin(row);
    });
  }

  function rings() {
    const group = element("rings");
    if (!group) return;
    group.replaceChildren();
    for (const [row, name] of [[chosen.pinned, "ring pinned"], [chosen.pointed, "ring"]]) {
      const mark = row && plotted.find((candidate) => candidate.row === row);
      if (mark) svg("circle", { class: name, cx: mark.x, cy: mark.y, r: 14 }, group);
    }
  }

  function nearest(event) {
    const bounds = plot.getBoundingClientRect();
    const x = event.clientX - bounds.left, y = event.clientY - bounds.top;
    let best = null, least = REACH * REACH;
    for (const mark of plotted) {
      const distance = (mark.x - x) ** 2 + (mark.y - y) ** 2;
      if (distance < least || (distance === least && mark.row.front)) [best, least] = [mark.row, distance];
    }
    return best;
  }

  function details() {
    const panel = element("details");
    panel.replaceChildren();
    const columns = [...new Set([chosen.pinned, chosen.pointed])].filter(Boolean);
    if (!columns.length) {
      html("p", "Point at a mark, or reach the front with the Tab key.", panel, "quiet");
      return;
    }
    const made = html("table", null, panel);
    const head = html("tr", null, html("thead", null, made));
    html("th", "", head);
    for (const row of columns) html("th", `trial ${row.trial}${row === chosen.pinned ? " (pinned)" : ""}`, head).scope = "col";
    const body = html("tbody", null, made);
    for (const key of study.details) {
      if (columns.every((row) => row[key] === null || row[key] === undefined)) continue;
      if (key === "backend_requested" && columns.every((row) => row[key] === row.backend)) continue;
      const line = html("tr", null, body);
      html("th", labels[key] || key, line).scope = "row";
      for (const row of columns) {
        const text = written(row, key).join(" ").trim();
        html("td", text, line, text.length > 30 ? "long" : "");
      }
    }
  }

  function start() {
    for (const [id, first] of [["x-axis", study.axes[0]], ["y-axis", study.axes[1]]]) {
      for (const key of study.axes) {
        const option = html("option", labels[key], element(id));
        option.value = key;
        option.selected = key === first;
      }
    }
    for (const id of ["x-axis", "y-axis", "everything", "x-log", "y-log"]) element(id).addEventListener("change", draw);
    plot.addEventListener("mousemove", (event) => chosen.point(nearest(event)));
    plot.addEventListener("mouseleave", () => chosen.point(null));
    plot.addEventListener("click", (event) => {
      const row = nearest(event);
      if (row) chosen.pin(row);
    });
    chosen.watchers.push(rings, details);
    let width = 0;
    new ResizeObserver(() => {
      if (plot.clientWidth === width) return;
      width = plot.clientWidth;
      draw();
    }).observe(plot);
    draw();
    details();
  }

  return { start };
})();

"use strict";
(() => {
  const study = JSON.parse(document.getElementById("data").textContent);
  const trials = study.rows.map((values) => Object.fromEntries(study.keys.map((key, i) => [key, values[i]])));
  const labels = study.labels;
  const onFront = new Set(study.front);
  const frontRows = study.front.map((index) => trials[index]);
  const complete = trials.filter((row) => row.state === "complete");
  const box = { left: 70, right: 745, top: 15, bottom: 410 };
  const reach = 18; // how near the pointer has to be, in the plot's own units
  const pageSize = 50;
  let plotted = [];
  let pinned = null;
  let pointed = null;
  let order = { key: "trial", up: true };
  let page = 0;

  const element = (id) => document.getElementById(id);
  const plot = element("plot");

  function svg(name, attributes, parent = plot) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent.append(made);
    return made;
  }

  function html(name, text, parent, className) {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    if (className) made.className = className;
    if (parent) parent.append(made);
    return made;
  }

  function show(value, key) {
    if (value === null || value === undefined) return "";
    if (typeof value !== "number") return String(value);
    if (key in study.decimals) return value.toFixed(study.decimals[key]);
    return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
  }

  function withInterval(row, key) {
    const low = row[key + "_low"], high = row[key + "_high"];
    const interval = typeof low === "number" && typeof high === "number" ? ` [${show(low, key)}, ${show(high, key)}]` : "";
    return show(row[key], key) + interval;
  }

  // The chart

  /** The whole way, or the front with as much again on both sides, where there are trials. */
  function span(values, front, all) {
    let low = Math.min(...values), high = Math.max(...values);
    const best = Math.min(...front), worst = Math.max(...front);
    if (!all && worst > best) {
      low = Math.max(low, best - 1.2 * (worst - best));
      high = Math.min(high, worst + 1.2 * (worst - best));
    }
    const margin = 0.06 * (high - low) || 0.1 * Math.abs(low) || 1;
    return [low - margin, high + margin];
  }

  function ticks(low, high) {
    const rough = (high - low) / 6;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  function draw() {
    const x = element("x-axis").value, y = element("y-axis").value, all = element("everything").checked;
    plot.replaceChildren();
    const rows = complete.filter((row) => typeof row[x] === "number" && typeof row[y] === "number");
    plotted = [];
    if (!rows.length) {
      svg("text", { x: 380, y: 220, "text-anchor": "middle" }).textContent = "no trial has both of these measures";
      return;
    }
    const front = frontRows.filter((row) => typeof row[x] === "number" && typeof row[y] === "number");
    const [left, right] = span(rows.map((row) => row[x]), front.map((row) => row[x]), all);
    const [bottom, top] = span(rows.map((row) => row[y]), front.map((row) => row[y]), all);
    const across = (value) => box.left + ((value - left) / (right - left)) * (box.right - box.left);
    const up = (value) => box.bottom - ((value - bottom) / (top - bottom)) * (box.bottom - box.top);
    const inside = (row) => row[x] >= left && row[x] <= right && row[y] >= bottom && row[y] <= top;
    axes(x, y, ticks(left, right), ticks(bottom, top), across, up);
    plotted = rows.filter(inside).map((row) => ({ row, x: across(row[x]), y: up(row[y]) }));
    const beyond = rows.length - plotted.length;
    element("beyond").textContent = beyond ? `${beyond} trials are beyond the edge` : "";

    band(x, y, across, up);
    baseline(x, y, [left, right], [bottom, top], across, up);
    const dots = plotted.filter((mark) => !onFront.has(mark.row.index));
    const feasible = dots.filter((mark) => mark.row.feasible !== false);
    const infeasible = dots.filter((mark) => mark.row.feasible === false);
    // one path each, however many trials there are
    svg("path", { class: "others", d: feasible.map((m) => `M${m.x.toFixed(1)} ${m.y.toFixed(1)}h0`).join("") });
    const circle = "a3 3 0 1 0 6 0a3 3 0 1 0 -6 0";
    const circles = infeasible.map((m) => `M${(m.x - 3).toFixed(1)} ${m.y.toFixed(1)}${circle}`);
    svg("path", { class: "infeasible", d: circles.join("") });
    frontMarks(x, y, across, up);
    svg("g", { id: "rings" });
    rings();
  }

  function axes(x, y, xTicks, yTicks, across, up) {
    const lines = [];
    for (const value of xTicks) {
      lines.push(`M${across(value)} ${box.top}V${box.bottom}`);
      svg("text", { x: across(value), y: box.bottom + 18, "text-anchor": "middle" }).textContent = show(value);
    }
    for (const value of yTicks) {
      lines.push(`M${box.left} ${up(value)}H${box.right}`);
      svg("text", { x: box.left - 8, y: up(value) + 4, "text-anchor": "end" }).textContent = show(value);
    }
    svg("path", { class: "grid", d: lines.join("") });
    const middle = (box.top + box.bottom) / 2;
    svg("text", { x: (box.left + box.right) / 2, y: 450, "text-anchor": "middle" }).textContent = labels[x];
    const title = svg("text", { x: 16, y: middle, "text-anchor": "middle", transform: `rotate(-90 16 ${middle})` });
    title.textContent = labels[y];
  }

  /** What nine of ten drawn fronts attain or miss, between two staircases, and the edge of what half of them attain. */
  function band(x, y, across, up) {
    const names = Object.keys(study.objectives);
    if (!study.band || x === y || !names.includes(x) || !names.includes(y)) return;
    const clamp = (value, low, high) => Number(Math.min(Math.max(value, low), high).toFixed(1));
    const worstX = study.objectives[x] === "minimize" ? box.right : box.left;
    const worstY = study.objectives[y] === "minimize" ? box.top : box.bottom;
    const stairs = (corners) => {
      const places = (x === names[0] ? corners : corners.map(([a, b]) => [b, a]).reverse())
        .map(([a, b]) => [clamp(across(a), box.left, box.right), clamp(up(b), box.top, box.bottom)])
        .filter(([h, v]) => h !== worstX && v !== worstY);
      if (!places.length) return `M${worstX} ${worstY}`;
      return `M${places[0][0]} ${worstY}${places.map(([h, v]) => `H${h}V${v}`).join("")}H${worstX}`;
    };
    const [hardly, half, surely] = study.band.map(stairs);
    const close = `V${worstY}Z`;
    svg("path", { class: "band", "fill-rule": "evenodd", d: hardly + close + surely + close });
    svg("path", { class: "half", d: half });
  }

  function baseline(x, y, [left, right], [bottom, top], across, up) {
    if (!study.baseline) return;
    const xValue = study.baseline[x], yValue = study.baseline[y];
    let path = "";
    if (typeof xValue === "number" && xValue >= left && xValue <= right) path += `M${across(xValue)} ${box.top}V${box.bottom}`;
    if (typeof yValue === "number" && yValue >= bottom && yValue <= top) path += `M${box.left} ${up(yValue)}H${box.right}`;
    svg("path", { class: "baseline", d: path });
  }

  function frontMarks(x, y, across, up) {
    const marks = plotted.filter((mark) => onFront.has(mark.row.index)).sort((a, b) => a.x - b.x);
    const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
    const horizontal = (value) => clamp(across(value), box.left, box.right).toFixed(1);
    const vertical = (value) => clamp(up(value), box.top, box.bottom).toFixed(1);
    let whiskers = "";
    for (const { row, x: cx, y: cy } of marks) {
      if (typeof row[x + "_low"] === "number") whiskers += `M${horizontal(row[x + "_low"])} ${cy}H${horizontal(row[x + "_high"])}`;
      if (typeof row[y + "_low"] === "number") whiskers += `M${cx} ${vertical(row[y + "_low"])}V${vertical(row[y + "_high"])}`;
    }
    svg("path", { class: "whiskers", d: whiskers });
    const names = Object.keys(study.objectives);
    if (names.length === 2 && names.includes(x) && names.includes(y) && x !== y && marks.length) {
      // between two neighbours nothing better is known than the worse of the two: horizontal first where less is better
      const first = study.objectives[x] === "minimize" ? (m) => `H${m.x}V${m.y}` : (m) => `V${m.y}H${m.x}`;
      svg("path", { class: "stairs", d: `M${marks[0].x} ${marks[0].y}` + marks.slice(1).map(first).join("") });
    }
    for (const mark of marks) {
      const recommended = mark.row.index === study.recommended;
      const size = recommended ? 10 : 7;
      const shape = svg("path", {
        class: recommended ? "front recommended" : "front",
        d: `M${mark.x} ${mark.y - size}l${size} ${size}l${-size} ${size}l${-size} ${-size}z`,
        tabindex: 0,
        role: "button",
        "data-trial": mark.row.trial,
        "aria-label": `${recommended ? "recommended, " : ""}trial ${mark.row.trial}: ${labels[x]} ${show(mark.row[x], x)}, ${labels[y]} ${show(mark.row[y], y)}`,
      });
      shape.addEventListener("focus", () => point(mark.row));
      shape.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        pin(mark.row);
      });
      if (marks.length <= 25) svg("text", { class: "label", x: mark.x + 9, y: mark.y - 9 }).textContent = mark.row.trial;
    }
  }

  function rings() {
    const group = element("rings");
    if (!group) return;
    group.replaceChildren();
    for (const [row, name] of [[pinned, "ring pinned"], [pointed, "ring"]]) {
      const mark = row && plotted.find((candidate) => candidate.row === row);
      if (mark) svg("circle", { class: name, cx: mark.x, cy: mark.y, r: 13 }, group);
    }
  }

  function nearest(event) {
    const bounds = plot.getBoundingClientRect();
    const x = ((event.clientX - bounds.left) * 760) / bounds.width;
    const y = ((event.clientY - bounds.top) * 460) / bounds.height;
    let best = null, least = reach * reach;
    for (const mark of plotted) {
      const distance = (mark.x - x) ** 2 + (mark.y - y) ** 2;
      if (distance <= least) [best, least] = [mark.row, distance];
    }
    return best;
  }

  function point(row) {
    if (row === pointed) return;
    pointed = row;
    rings();
    details();
  }

  function pin(row) {
    pinned = pinned === row ? null : row;
    rings();
    details();
    table();
  }

  function details() {
    const panel = element("details");
    panel.replaceChildren();
    const columns = [...new Set([pinned, pointed])].filter(Boolean);
    if (!columns.length) {
      html("p", "Point at a mark, or reach the front with the Tab key.", panel, "quiet");
      return;
    }
    const made = html("table", null, panel);
    const head = html("tr", null, html("thead", null, made));
    html("th", "", head);
    for (const row of columns) html("th", `trial ${row.trial}${row === pinned ? " (pinned)" : ""}`, head).scope = "col";
    const body = html("tbody", null, made);
    for (const key of study.details) {
      if (columns.every((row) => row[key] === null || row[key] === undefined)) continue;
      if (key === "backend_requested" && columns.every((row) => row[key] === row.backend)) continue;
      const line = html("tr", null, body);
      html("th", labels[key] || key, line).scope = "row";
      for (const row of columns) {
        const text = withInterval(row, key);
        html("td", text, line, text.length > 30 ? "long" : "");
      }
    }
  }

  // The table

  function compare(a, b) {
    const one = a[order.key], other = b[order.key];
    const missing = (value) => value === null || value === undefined;
    if (missing(one) || missing(other)) return missing(one) - missing(other);
    const sign = order.up ? 1 : -1;
    if (typeof one === "number" && typeof other === "number") return sign * (one - other);
    return sign * String(one).localeCompare(String(other));
  }

  function table() {
    const wanted = element("filter").value.trim().toLowerCase();
    const text = (row) => study.table.map((key) => show(row[key], key)).join(" ").toLowerCase();
    const chosen = (wanted ? trials.filter((row) => text(row).includes(wanted)) : trials.slice()).sort(compare);
    const pages = Math.max(1, Math.ceil(chosen.length / pageSize));
    page = Math.min(page, pages - 1);
    const first = page * pageSize;
    element("count").textContent = chosen.length
      ? `${first + 1} to ${Math.min(first + pageSize, chosen.length)} of ${chosen.length} trials`
      : "no trial";
    element("previous").disabled = page === 0;
    element("next").disabled = page === pages - 1;
    const body = element("all").tBodies[0];
    body.replaceChildren();
    for (const row of chosen.slice(first, first + pageSize)) {
      const line = html("tr", null, body, row === pinned ? "pinned" : "");
      for (const key of study.table) {
        const cell = html("td", null, line, typeof row[key] === "number" ? "number" : key === "reason" ? "reason" : "");
        if (key !== "trial") {
          cell.textContent = show(row[key], key);
          continue;
        }
        const button = html("button", show(row.trial), cell);
        button.type = "button";
        button.title = "pin it in the chart";
        button.addEventListener("click", () => pin(row));
      }
    }
    for (const head of element("all").tHead.rows[0].cells) {
      const sorted = head.dataset.key === order.key ? (order.up ? "ascending" : "descending") : "none";
      head.setAttribute("aria-sort", sorted);
      head.firstChild.textContent = head.dataset.label + { ascending: " ▲", descending: " ▼", none: "" }[sorted];
    }
  }

  function start() {
    trials.forEach((row, index) => { row.index = index; });
    for (const [id, chosen] of [["x-axis", study.axes[0]], ["y-axis", study.axes[1]]]) {
      for (const key of study.axes) {
        const option = html("option", labels[key], element(id));
        option.value = key;
        option.selected = key === chosen;
      }
      element(id).addEventListener("change", draw);
    }
    element("everything").addEventListener("change", draw);
    plot.addEventListener("mousemove", (event) => point(nearest(event)));
    plot.addEventListener("mouseleave", () => point(null));
    plot.addEventListener("click", (event) => {
      const row = nearest(event);
      if (row) pin(row);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && pinned) pin(pinned);
    });
    const head = html("tr", null, element("all").tHead);
    for (const key of study.table) {
      const cell = html("th", null, head);
      cell.scope = "col";
      cell.dataset.key = key;
      cell.dataset.label = labels[key] || key;
      const button = html("button", cell.dataset.label, cell);
      button.type = "button";
      button.addEventListener("click", () => {
        order = { key, up: order.key === key ? !order.up : true };
        page = 0;
        table();
      });
    }
    element("filter").addEventListener("input", () => { page = 0; table(); });
    element("previous").addEventListener("click", () => { page -= 1; table(); });
    element("next").addEventListener("click", () => { page += 1; table(); });
    draw();
    details();
    table();
  }

  start();
})();

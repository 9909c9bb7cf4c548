/** What a row was made by: the command that measures it again, its run in MLflow, its files. */
const sources = (() => {
  const isFile = location.protocol === "file:"; // where a server sends the page, the study's files are not beside it

  function commandOf(row) {
    const place = "index" in row ? row.index : trials.length + study.fixed.indexOf(row);
    return study.commands.of[place].map((word) => study.commands.words[word]).join(" ");
  }

  /** Name and path of each, from the page's folder. */
  function filesOf(row) {
    const entry = (name) => `${study.folder}/../.store/${name.slice(0, 2)}/${name}.json`;
    const entries = (names) => (names ? names.split(" ") : []);
    return [
      ["the trial's line", `${study.folder}/trials.jsonl`],
      ...(row.rounds ? [["its rounds of confirming", `${study.folder}/rounds.jsonl`]] : []),
      ...entries(row.quality_entry).map((name) => ["its losses' entry in the store", entry(name)]),
      ...entries(row.speed_entry).map((name) => ["its timing's entry in the store", entry(name)]),
    ];
  }

  function runOf(row) {
    return study.mlflow ? study.mlflow.address + encodeURIComponent(`'${row.trial}'`) : "";
  }

  function link(text, address, parent) {
    const made = html("a", text, parent);
    made.href = address;
    made.rel = "noreferrer";
    return made;
  }

  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = html("textarea", text, document.body); // without leave for the clipboard, as it has been done always
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    const before = button.textContent;
    button.textContent = "copied";
    setTimeout(() => { button.textContent = before; }, 1200);
  }

  function copier(text, parent, what) {
    const button = html("button", "copy", parent, "copy");
    button.type = "button";
    button.title = what;
    button.addEventListener("click", () => { if (button.textContent === "copy") copy(text(), button); });
    return button;
  }

  /** Buttons and links of a row; `toggle` shows or hides all of it below. */
  function fill(cell, row, toggle, isOpen) {
    copier(() => commandOf(row), cell, "copy the command that measures it again").dataset.command = commandOf(row);
    if (study.mlflow) {
      const run = link("run", runOf(row), cell);
      run.title = `its run in MLflow${study.mlflow.command ? `, while \`${study.mlflow.command}\` runs` : ""}`;
    }
    const files = html("button", "files", cell, "files");
    files.type = "button";
    files.title = "its command, run and files";
    files.setAttribute("aria-expanded", String(Boolean(isOpen)));
    files.addEventListener("click", toggle);
  }

  function describe(cell, row) {
    const again = html("p", "Measured again by ", cell);
    html("code", commandOf(row), again);
    const traced = html("p", "Where each of its numbers comes from: ", cell);
    html("code", `${study.trace} ${row.trial}`, traced);
    if (study.mlflow) {
      const run = html("p", null, cell);
      link("Its run in MLflow", runOf(row), run);
      if (study.mlflow.command) run.append(", while ", html("code", study.mlflow.command, null), " runs");
    }
    const files = html("p", "Files: ", cell);
    filesOf(row).forEach(([name, path], i) => {
      if (i) files.append("; ");
      if (isFile) link(name, encodeURI(path), files);
      else files.append(`${name}, `, html("code", path, null));
    });
  }

  /** The rows of the front's table, which the page has already; each is shown below itself. */
  function fillFront() {
    const rows = new Map([...trials, ...study.fixed].map((row) => [String(row.trial), row]));
    for (const cell of document.querySelectorAll("#front-table td.sources")) {
      const row = rows.get(cell.dataset.trial);
      fill(cell, row, () => {
        const line = cell.parentElement, below = line.nextElementSibling;
        const isOpen = Boolean(below?.classList.contains("more"));
        cell.querySelector(".files").setAttribute("aria-expanded", String(!isOpen));
        if (isOpen) {
          below.remove();
          return;
        }
        const more = html("tr", null, null, "more");
        const wide = html("td", null, more);
        wide.colSpan = line.cells.length;
        describe(wide, row);
        line.after(more);
      });
    }
    for (const call of document.querySelectorAll(".call")) {
      copier(() => call.querySelector("code").textContent, call, "copy the call");
    }
  }

  return { fill, describe, fillFront };
})();

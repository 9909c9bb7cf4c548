"""An hour with any GPU turned into evidence; of torch, transformers, numpy and the engine only, without a network.

python -m tests.gpu.acceptance --out DIR                       everything
python -m tests.gpu.acceptance --out DIR --part exactness      correctness, exactness, speed, quantized, ...
python -m tests.gpu.acceptance --out DIR --check "ours"        checks with that in their name
python -m tests.gpu.acceptance --out DIR --scale quick         a first look: a smaller model, shorter streams
python -m tests.gpu.acceptance --out DIR --report              the tables of what was measured, once more

Each check runs in a process of its own, up to a deadline; what it found is written to DIR/results.json at once, beside
what other calls have put there. At the end there are tables, and DIR/README-gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

TIMED = ("speed", "quantized", "evaluator", "lease", "reference", "ring_kernel", "energy")
PARTS = ("correctness", "exactness", "kinds", *TIMED)
"""Modules beside this one, each with its `CHECKS`."""


@dataclass(frozen=True)
class Check:
    part: str
    name: str
    deadline: float
    """Seconds."""

    @property
    def timed(self) -> bool:
        """Whether it must run alone."""
        return self.part in TIMED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given several times (all)")
    parser.add_argument("--check", metavar="WORD", action="append", help="only checks whose name has it")
    parser.add_argument("--scale", choices=("full", "quick", "tiny"), help="full on a GPU, tiny on a CPU")
    parser.add_argument("--jobs", type=int, default=4, help="checks at a time of those that time nothing (4)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scale = arguments.scale or _default_scale()
    if arguments.one:
        return _run_here(arguments.one, scale, arguments.out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"facts": {}, "checks": {}}
    checks = [] if arguments.report else list(_chosen(arguments.part or PARTS, arguments.check))
    if checks:
        results["facts"] = _facts(scale)
    for name, result in _run_all(checks, scale, arguments.jobs, arguments.out):
        results["checks"][name] = result
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{_verdict(result):8}{name}  ({result['seconds']:.0f} s)", flush=True)
    text = report(results)
    (arguments.out / "README-gpu.md").write_text(text)
    print(text)
    return 1 if any(_verdict(result) in ("wrong", "broken") for result in results["checks"].values()) else 0


def _default_scale() -> str:
    import torch

    return "full" if torch.cuda.is_available() else "tiny"


def _chosen(parts: list[str], words: list[str] | None) -> Iterator[Check]:
    for part in parts:
        for name, (_, deadline) in import_module(f".{part}", __package__).CHECKS.items():
            if not words or any(word in name for word in words):
                yield Check(part, name, deadline)


def _run_all(checks: list[Check], scale: str, jobs: int, out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What times nothing side by side first, the rest one after the other."""
    with ThreadPoolExecutor(jobs) as side_by_side:
        running = {side_by_side.submit(_run, c, scale, out): c for c in checks if not c.timed}
        for done in as_completed(running):
            yield _title(running[done]), done.result()
    for check in checks:
        if check.timed:
            yield _title(check), _run(check, scale, out)


def _title(check: Check) -> str:
    return f"{check.part}: {check.name}"


def _run(check: Check, scale: str, out: Path) -> dict[str, Any]:
    """In a process of its own, which is killed with all that it started when its time is up."""
    found = out / f".{check.part}-{check.name.replace(' ', '_')}.json"
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.acceptance", "--out", str(found), "--scale", scale, "--one"]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, _title(check)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=check.deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0] + f"\nkilled after {check.deadline:g} s"
    seconds = {"seconds": time.monotonic() - started, "scale": scale}
    if not found.exists():
        return {"ok": False, "rows": [], "failed": output[-1500:]} | seconds
    result: dict[str, Any] = json.loads(found.read_text()) | seconds
    found.unlink()
    return result


def _run_here(title: str, scale: str, file: Path) -> int:
    from .scale import SCALES

    part, name = title.split(": ", 1)
    result = import_module(f".{part}", __package__).CHECKS[name][0](SCALES[scale])
    file.write_text(json.dumps(result, default=float))
    return 0


def _facts(scale: str) -> dict[str, Any]:
    import torch

    from streamllm.engine.device import default_device, device_name
    from tests.benchmarks.reporting import machine

    device = default_device()
    return machine() | {
        "device": device_name(device),
        "scale": scale,
        "cuda": torch.version.cuda,
        "capability": torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
    }


def _verdict(result: dict[str, Any]) -> str:
    if "failed" in result:
        return "broken"
    return {True: "right", False: "wrong", None: "skipped" if "skipped" in result else "measured"}[result["ok"]]


def report(results: dict[str, Any]) -> str:
    """All of it as Markdown."""
    from tests.benchmarks.reporting import markdown_table

    facts = results["facts"]
    torch_version = facts.get("versions", {}).get("torch", "?")
    lines = [f"Measured on {facts.get('device')} with torch {torch_version}, {facts.get('date')}, scale "
             f"{facts.get('scale')}."]  # fmt: skip
    rows = [row for name, result in results["checks"].items() if name.startswith(("speed", "quantized"))
            for row in result["rows"] if "ratio to ring eager" in row]  # fmt: skip
    if rows:
        lines += ["", "### Time per token", "", markdown_table(_compared(rows))]
    for name, result in sorted(results["checks"].items(), key=lambda item: PARTS.index(item[0].split(":")[0])):
        lines += ["", f"### {name}: {_verdict(result)} ({result['seconds']:.0f} s)", ""]
        lines += [f"{key}: {value}" for key, value in result.items() if key not in _FIELDS]
        lines.append(f"```\n{result['failed']}\n```" if "failed" in result else markdown_table(_shown(result["rows"])))
    return "\n".join(lines) + "\n"


_FIELDS = ("ok", "rows", "seconds", "scale", "failed")


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All variants in one table: what was timed beside the same reference compares by the ratios to it."""
    baseline = next((row["ratio to ring eager"] for row in rows if row["variant"] == "recompute"), None)
    return [
        {name: value for name, value in row.items() if name not in ("parts", "largest", "ratio low", "ratio high")}
        | ({"times as fast as recompute": baseline / row["ratio to ring eager"]} if baseline else {})
        for row in rows
    ]


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of dozens of rows that are right the worst one."""
    if len(rows) <= 24 or not all("ok" in row for row in rows):
        return rows
    wrong = [row for row in rows if not row["ok"]]
    return wrong or [max(rows, key=lambda row: row.get("largest", 0)) | {"rows, all right": len(rows)}]


if __name__ == "__main__":
    sys.exit(main())

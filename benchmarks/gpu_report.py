"""First contact with a GPU: tests, speed, long training and the index, in parts (docs/gpu.md).

    python3 benchmarks/gpu_report.py --wheels FOLDER --out FOLDER --limit 570
    python3 benchmarks/gpu_report.py --write-docs FOLDER ...

Needs a Python 3.12 with torch, and a folder of wheels for what else is missing (`make gpu-wheels`); no network. The parts
run in the order given, each within its share of `--limit`: what one does not use goes to those after it. Results are
written row by row, so a cut loses only what was running. A part that is done is not repeated (`--again` does), and one that
was stopped resumes after the rows that it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu.context import Context, Row
from gpu.machine import Environment, code_version, hardware
from gpu.report import write_docs, write_report
from gpu.runner import Stopped, child_command, context_of, limits_of, read_json, run_child, supervise
from gpu.wheels import download

HERE = Path(__file__).resolve().parent
PARTS = {"a": ("gpu.part_a", 150.0), "b": ("gpu.part_b", 330.0), "c": ("gpu.part_c", 150.0), "d": ("gpu.part_d", 90.0)}
"""Module of each part, and its planned seconds on a GPU: 12 minutes together."""
RESERVE = 15.0
"""Seconds of the whole that are kept for ending a part and writing the report."""


def line_of(name: str, row: Row) -> str:
    """A row as it is printed while the report runs."""
    if "error" in row or "skipped" in row:
        return f"{name}  {row['name']}: {'FAILED: ' + str(row['error']) if 'error' in row else row['skipped']}"
    numbers = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    return f"{name}  {row['name']}: {', '.join(numbers[:8]) or 'ok'}"


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "gpu-report", help="folder of the results")
    parser.add_argument(
        "--wheels", type=Path, help="folder that make gpu-wheels filled; default: use the packages that are there"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="in this order")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--scale", choices=("small", "full"), default="full")
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="of the whole call; by default what the parts are planned for"
    )
    parser.add_argument(
        "--work", type=Path, default=HERE.parent / "runs" / "gpu-work", help="scratch, kept for the next call"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument(
        "--write-docs", nargs="*", type=Path, metavar="FOLDER", help="put results into docs/gpu.md and docs/scaling.md"
    )
    parser.add_argument(
        "--download-wheels", type=Path, metavar="FOLDER", help="fill FOLDER with the wheels (needs a network)"
    )
    parser.add_argument("--child", metavar="JSON", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the parts, or do one of the other things that the options name."""
    began = time.time()
    options = parse()
    if options.child:
        words = json.loads(options.child)
        return run_child(words["part"], words["module"], context_of(words["context"]), Path(words["result"]))
    if options.download_wheels:
        download(options.download_wheels)
        return 0
    if options.write_docs is not None:
        write_docs(HERE.parent / "docs", options.write_docs)
        return 0
    return report(options, began)


def report(options: argparse.Namespace, began: float) -> int:
    """Run the parts and write the report after each; 0 where each of them is done without a failed row."""
    out, work, repo = options.out.resolve(), options.work.resolve(), HERE.parent
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    modules = {name: module for name, (module, _) in PARTS.items()}
    weights = {name: PARTS[name][1] for name in options.parts}
    total = options.limit or sum(weights.values())
    environment = Environment(repo, options.wheels, work, options.device)
    facts: dict[str, Any] = {
        "device": options.device, "scale": options.scale, "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "machine": hardware(), "packages": environment.facts, "code": code_version(repo), "limit": total,
        "notes": environment.notes, "prepare_s": round(time.time() - began, 1),
    }  # fmt: skip
    print(
        json.dumps({key: facts[key] for key in ("machine", "packages", "code", "notes", "prepare_s")}, indent=1),
        flush=True,
    )
    if options.device == "cuda" and not environment.facts.get("gpus"):
        print("torch sees no GPU here; --device cpu --scale small is the rehearsal without one")
        return 1
    context = Context(options.device, options.scale, work, 0.0, environment.faiss_gpu, repo, only=tuple(options.only))
    summary = write_report(out, facts, modules)
    try:
        for place, name in enumerate(options.parts):
            left = total - RESERVE - (time.time() - began)
            limit = limits_of({each: weights[each] for each in options.parts[place:]}, left)[name]
            run_part(name, context, environment, out, limit, options.again)
            summary = write_report(out, facts, modules)
    except Stopped as stopped:
        print(f"stopped: {stopped}")
        write_report(out, facts, modules)
        return 143
    print(f"{time.time() - began:.0f} s; results in {out}/report.md")
    ran = [summary["parts"][name] for name in options.parts]
    return int(any(part["state"] != "done" or any("error" in row for row in part["rows"]) for part in ran))


def run_part(name: str, context: Context, environment: Environment, out: Path, limit: float, again: bool) -> None:
    """Run one part, unless it is done."""
    module, planned = PARTS[name]
    result = out / f"part_{name}.json"
    earlier = read_json(result)
    if again:
        result.unlink(missing_ok=True)
    elif earlier.get("state") == "done" and not context.only:
        print(f"{name}  done before; --again repeats it")
        return
    else:
        finished = frozenset(row["name"] for row in earlier.get("rows", []) if not {"error", "skipped"} & row.keys())
        context = replace(context, finished=finished)
    print(f"{name}  at most {limit:.0f} s (planned {planned:.0f})", flush=True)
    context = replace(context, deadline=time.time() + limit)
    command = child_command(Path(__file__).resolve(), name, module, context, result)
    done = supervise(command, environment.variables(), result, out / "log.txt", limit,
                     lambda row: print(line_of(name, row), flush=True))  # fmt: skip
    print(
        f"{name}  {done['state']} after {done['seconds']:.0f} s{': ' + done['error'] if done.get('error') else ''}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

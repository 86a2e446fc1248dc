"""From the parts' JSON to a report: `report.json`, `report.md`, and the sections of the docs that are generated from them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu.context import Row
from gpu.runner import read_json, write_json

NOTHING = "Nothing of this project has been measured on a GPU yet."
NAMES = {"name", "error", "skipped"}


def value_text(value: Any, form: str = "") -> str:
    """A value as the tables show it."""
    if value is None:
        return ""
    if form and isinstance(value, int | float) and not isinstance(value, bool):
        return format(round(value) if form.endswith("d") else value, form)
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/")


def table_of(rows: list[Row], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """Markdown: rows that have the first column's value go into a table; all others are listed below it with all theirs."""
    in_table = [row for row in rows if not NAMES & (row.keys() - {"name"}) and next(iter(columns), None) in row]
    lines: list[str] = []
    if in_table:
        used = {key: column for key, column in columns.items() if any(key in row for row in in_table)}
        lines = ["| | " + " | ".join(title for title, _ in used.values()) + " |",
                 "| --- |" + " ---: |" * len(used)]  # fmt: skip
        for row in in_table:
            cells = [value_text(row.get(key), form) for key, (_, form) in used.items()]
            lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
        lines.append("")
    for row in rows:
        if row in in_table:
            continue
        if "error" in row or "skipped" in row:
            lines.append(
                f"- {row['name']}: {'FAILED' if 'error' in row else 'not run'}: {row.get('error', row.get('skipped'))}"
            )
            continue
        facts = ", ".join(
            f"{key} {value_text(value)}"
            for key, value in row.items()
            if key != "name" and isinstance(value, int | float | str)
        )
        lines.append(f"- {row['name']}: {facts}")
    return lines


def columns_of(module_name: str) -> Mapping[str, tuple[str, str]]:
    """The columns of a part's table; none where the part has none or cannot be imported here."""
    try:
        columns: Mapping[str, tuple[str, str]] = getattr(importlib.import_module(module_name), "COLUMNS", {})
    except ImportError:
        return {}
    return columns


def machine_line(report: Mapping[str, Any]) -> str:
    """Hardware and software in one sentence."""
    machine, packages = report["machine"], report["packages"]
    gpu = packages.get("gpu") if report["device"] == "cuda" else None
    parts = [f"{gpu}, {packages['gpu_memory_gb']} GB" if gpu else "no GPU", f"{machine['cores']} CPU cores",
             f"{machine['memory_gb']:.0f} GB", f"Python {machine['python']}", f"torch {packages.get('torch')}"]  # fmt: skip
    if gpu:
        parts += [f"CUDA {packages.get('cuda')}", f"driver {machine.get('driver', 'unknown')}"]
    parts += [f"{name} {packages[name]}" for name in ("lightning", "transformers", "faiss") if packages.get(name)]
    return ", ".join(parts)


def markdown(report: Mapping[str, Any], level: str = "##") -> str:
    """The report as a page."""
    kind = (
        "Measured on a GPU"
        if report["device"] == "cuda"
        else "Rehearsal on a CPU: it shows that everything runs, not how fast"
    )
    lines = [f"{kind} (scale `{report['scale']}`, {report['date']}, code {report['code'] or 'unknown'}).", "",
             f"Machine: {machine_line(report)}.", *[f"Note: {note}." for note in report["notes"]], ""]  # fmt: skip
    lines += ["| part | | state | rows | failed | seconds | limit |", "| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for name, part in report["parts"].items():
        failed = sum("error" in row for row in part["rows"])
        lines.append(f"| {name} | {part['title']} | {part['state']} | {len(part['rows'])} | {failed} | "
                     f"{value_text(part.get('seconds'), '.0f')} | {value_text(part.get('limit'), '.0f')} |")  # fmt: skip
    lines.append("")
    for name, part in report["parts"].items():
        lines += [f"{level} {name}. {part['title']}", ""]
        if part.get("error"):
            lines += [f"State: {part['state']}: {part['error']}", ""]
        lines += [*table_of(part["rows"], columns_of(part["module"])), ""]
        if part["targets"] and report["device"] == "cuda":
            lines += ["To be reached:", ""]
            lines += [f"- {each['what']}: {each['value']:.3f}, {'reached' if each['reached'] else '**NOT reached**'}"
                      for each in part["targets"]]  # fmt: skip
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def write_report(out: Path, facts: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any]:
    """Join what the parts have written so far.

    Args:
        out: folder of the parts' results.
        facts: machine, packages, code and so on.
        modules: module of each part.

    Returns:
        The report, also in `report.json` and `report.md`.
    """
    parts = {}
    for name, module in modules.items():
        if found := read_json(out / f"part_{name}.json"):
            parts[name] = {**found, "module": module}
    report = {**facts, "parts": parts}
    write_json(out / "report.json", report)
    partial = out / "report.md.partial"
    partial.write_text(f"# GPU report\n\n{markdown(report)}")
    partial.replace(out / "report.md")
    return report


def join_reports(folders: list[Path]) -> list[dict[str, Any]]:
    """Reports of several calls; of the same machine, device and scale a later part takes the place of an earlier one.

    Raises:
        SystemExit: a folder has no report.
    """
    joined: dict[tuple[str, ...], dict[str, Any]] = {}
    for folder in folders:
        report = read_json(folder / "report.json")
        if not report:
            raise SystemExit(f"{folder}: has no report.json; give the folder of --out")
        key = (report["device"], report["scale"], str(report["packages"].get("gpu")), str(report["machine"]["cores"]))
        parts = {**joined.get(key, {}).get("parts", {}), **report["parts"]}
        notes = list(dict.fromkeys([*joined.get(key, {}).get("notes", []), *report["notes"]]))
        joined[key] = {**report, "notes": notes, "parts": dict(sorted(parts.items()))}
    return list(joined.values())


def replace_section(page: str, name: str, text: str) -> str:
    """The page with what is between `<!-- NAME -->` and `<!-- end of NAME -->` replaced.

    Raises:
        SystemExit: the page has no such section.
    """
    begin, finish = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if page.count(begin) != 1 or page.count(finish) != 1:
        raise SystemExit(f"the page has no section between {begin} and {finish}")
    return re.sub(
        f"{re.escape(begin)}.*{re.escape(finish)}", lambda _: f"{begin}\n{text.strip()}\n{finish}", page, flags=re.S
    )


def write_docs(docs: Path, folders: list[Path]) -> None:
    """Put the results into docs/gpu.md and docs/scaling.md.

    Args:
        docs: folder of the pages.
        folders: of `--out`, oldest first; none: the pages say that nothing was measured.
    """
    reports = join_reports(folders)
    measured = [report for report in reports if report["device"] == "cuda" and report["scale"] == "full"]
    pieces = [] if measured else [NOTHING + (" The report was rehearsed on a CPU, below." if reports else "")]
    pieces += [markdown(report, "###") for report in reports]
    page = docs / "gpu.md"
    page.write_text(replace_section(page.read_text(), "results", "\n\n".join(pieces)))
    page = docs / "scaling.md"
    for part, section in (("b", "gpu training"), ("d", "gpu index")):
        tables = [
            f"{machine_line(report)}, code {report['code']}:\n\n"
            + "\n".join(table_of(report["parts"][part]["rows"], columns_of(report["parts"][part]["module"])))
            for report in measured
            if part in report["parts"]
        ]
        page.write_text(replace_section(page.read_text(), section, "\n\n".join(tables) or f"**{NOTHING}**"))

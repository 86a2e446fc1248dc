"""The parts of a findings table that stand when the command is stopped, so that the same command goes on from there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ctx_distill.text
from ctx_distill.files import hash_file, hash_json, write_json
from ctx_distill.text.extractor import load_vocabulary


def parts_folder(out: Path) -> Path:
    """Beside the table, until that is whole."""
    return out.with_name(f".{out.name}.parts")


def request_hash(source: Path, vocabulary: str, part_size: int) -> str:
    """Of everything that a part depends on: the reports, the phrases, the rules, the size of a part."""
    rules = sorted(
        path for path in Path(ctx_distill.text.__file__).parent.rglob("*") if path.suffix in (".py", ".yaml")
    )
    return hash_json(
        [hash_file(source), repr(load_vocabulary(vocabulary).findings), [hash_file(path) for path in rules], part_size]
    )


def standing_parts(folder: Path, request: str) -> dict[int, Any]:
    """Place -> content of the parts that this request left; those of another request are deleted."""
    try:
        if json.loads((folder / "request.json").read_text(encoding="utf-8")) != {"request": request}:
            raise ValueError
    except (OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "request.json", {"request": request})
        return {}
    found = {}
    for path in folder.glob("part-*.json"):
        try:
            found[int(path.stem.removeprefix("part-"))] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            path.unlink(missing_ok=True)
    return found


def write_part(folder: Path, place: int, content: Any) -> None:
    """Write one part, whole or not at all."""
    write_json(folder / f"part-{place:08d}.json", content)

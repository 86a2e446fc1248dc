"""Store completed parts of a findings table, so that an interrupted command can be resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ctx_distill.text
from ctx_distill.files import hash_file, hash_json, write_json
from ctx_distill.text.extractor import load_vocabulary


def parts_folder(out: Path) -> Path:
    """Return the folder of the parts, next to the table until it is complete."""
    return out.with_name(f".{out.name}.parts")


def request_hash(source: Path, vocabulary: str, part_size: int) -> str:
    """Return a hash of everything that a part depends on: reports, vocabulary, rules and part size."""
    rules = sorted(
        path for path in Path(ctx_distill.text.__file__).parent.rglob("*") if path.suffix in (".py", ".yaml")
    )
    return hash_json(
        [hash_file(source), repr(load_vocabulary(vocabulary).findings), [hash_file(path) for path in rules], part_size]
    )


def completed_parts(folder: Path, request: str) -> dict[int, Any]:
    """Return the content of this request's parts by position; delete parts of other requests."""
    try:
        if json.loads((folder / "request.json").read_text(encoding="utf-8")) != {"request": request}:
            raise ValueError
    except (OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "request.json", {"request": request})
        return {}
    parts = {}
    for path in folder.glob("part-*.json"):
        try:
            parts[int(path.stem.removeprefix("part-"))] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            path.unlink(missing_ok=True)
    return parts


def write_part(folder: Path, place: int, content: Any) -> None:
    """Write one part atomically."""
    write_json(folder / f"part-{place:08d}.json", content)

"""Imports point down only, and help needs nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ctx_distill"
LAYERS = [
    {"cli", "__init__"},
    {"arguments", "ablation", "explorer"},
    {"pipeline"},
    {"inference"},
    {"tasks"},
    {"callbacks", "page"},
    {"metrics", "retrieval", "losses", "models", "data", "sources", "text", "phantom"},
    {"checkpoint", "distributed", "parallel", "types", "files", "errors", "signals", "seeds"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
HEAVY = {"torch", "lightning", "monai", "open_clip", "transformers", "pandas", "matplotlib", "faiss", "numpy"}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            if node.module == "ctx_distill":
                found |= {f"ctx_distill.{alias.name}" for alias in node.names}
    return found


def edges() -> list[tuple[str, str, Path]]:
    """(importing room, imported room, file) of the whole package."""
    result = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "ctx_distill" and len(parts) > 1 and parts[1] not in ("__version__", own):
                result.append((own, parts[1], path))
    return result


def test_imports_point_down() -> None:
    rooms = {own for own, _, _ in edges()} | {other for _, other, _ in edges()}
    assert rooms - {"__init__"} <= set(LAYER), f"rooms without a layer: {rooms - set(LAYER)}"
    upward = [f"{path.name}: {own} imports {other}" for own, other, path in edges() if LAYER[other] < LAYER[own]]
    assert not upward


def test_rooms_of_one_layer_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for own, other, _ in edges():
        if LAYER.get(own) == LAYER[other]:
            graph.setdefault(own, set()).add(other)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    assert not [room for room in graph if room in reachable(room)]


def test_faiss_is_imported_in_one_place_and_never_at_the_top() -> None:
    importing = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "faiss" in imports_of(path)}
    assert importing == {"retrieval/index.py"}
    top = ast.parse((PACKAGE / "retrieval/index.py").read_text()).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    assert "faiss" not in names


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"], ["all", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom ctx_distill.commands.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print('loaded:', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert "usage: ctx-distill" in done.stdout

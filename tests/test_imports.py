"""Imports point down only, and help needs nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ctx_distill"
LAYERS = [
    {"__main__", "__init__"},
    {"commands"},
    {"ablation", "explorer"},
    {"reporting", "probing"},
    {"runs"},
    {"inference"},
    {"stages"},
    {"retrieval", "training"},
    {"metrics", "losses", "models", "data", "text", "phantom", "sources"},
    {"checkpoint", "distributed", "parallel", "types", "files", "errors", "signals", "seeds", "progress"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
HEAVY = {"torch", "lightning", "monai", "open_clip", "transformers", "pandas", "matplotlib", "faiss", "numpy"}


def imports_of(path: Path) -> set[str]:
    """Imported modules, wherever in the file; of `from package import module` the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            folder = PACKAGE.parent.joinpath(*node.module.split("."))
            for alias in node.names:
                is_module = (folder / f"{alias.name}.py").is_file() or (folder / alias.name).is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_graph() -> dict[str, set[str]]:
    """Each module of the package with the modules that it imports, also inside functions."""
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    return {name: (imports_of(path) & set(modules)) - {name, "ctx_distill"} for name, path in modules.items()}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def edges() -> set[tuple[str, str]]:
    """(importing package, imported package) below `ctx_distill`."""
    pairs = {(package_of(name), package_of(other)) for name, others in module_graph().items() for other in others}
    return {(importing, imported) for importing, imported in pairs if importing != imported}


def in_circles(graph: dict[str, set[str]]) -> set[str]:
    """Nodes from which a path leads back to themselves."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    return {node for node in graph if node in reachable(node)}


def test_imports_point_down() -> None:
    packages = {name for pair in edges() for name in pair}
    assert packages <= set(LAYER), f"packages without a layer: {packages - set(LAYER)}"
    assert not [
        f"{importing} imports {imported}" for importing, imported in edges() if LAYER[imported] < LAYER[importing]
    ]


def test_packages_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for importing, imported in edges():
        graph.setdefault(importing, set()).add(imported)
    assert in_circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == {"a", "b"}
    assert not in_circles(graph)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    assert not in_circles(module_graph())


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
    assert "Usage: ctx-distill" in done.stdout

"""What a release needs: one version, runtime locks that are part of the locks, messages that need no Makefile."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import ctx_distill

ROOT = Path(__file__).parents[1]
MAKE = re.compile(r"\bmake [a-z]+-?[0-9]\b|`make [a-z]|\b(?:DATA|RUN|FORCE|ARGS|EXPERT|PRESET|GPUS|TASKS|SBATCH)=")
IN_A_CHECKOUT = {"explorer/viewer/__init__.py", "ablation/tables.py"}
"""Files whose strings name a target for people who have a checkout."""


def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return loaded["project"]  # type: ignore[no-any-return]


def locked(name: str) -> dict[str, set[str]]:
    """Return the hashes by `package==version` of a lock."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    rows = [line.split() for line in text.splitlines() if "==" in line]
    return {row[0]: {word for word in row if word.startswith("--hash=")} for row in rows}


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert project()["version"] == ctx_distill.__version__ == str(citation["version"]) == releases[0][0]
    assert str(citation["date-released"]) == releases[0][1]
    order = [tuple(map(int, version.split("."))) for version, _ in releases]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_a_runtime_lock_is_a_part_of_the_lock(extra: str) -> None:
    whole, part = locked(extra), locked(f"runtime-{extra}")
    assert {name for name in part if part[name] != whole.get(name)} == set()
    names = {name.split("==")[0] for name in part}
    # The project's own requirements are in it, and development tools are not.
    wanted = project()["dependencies"] + project()["optional-dependencies"]["serve"]
    wanted = {re.split(r"[\[<>=;]", line)[0].lower().replace("_", "-") for line in wanted}
    assert wanted <= names
    assert not names & {"pytest", "ruff", "mypy", "matplotlib", "mkdocs", "playwright"}
    assert {name for name in names if name.startswith("faiss")} == {"cpu": {"faiss-cpu"}, "gpu": {"faiss-gpu-cuvs"}}[
        extra
    ]


def test_messages_need_no_makefile() -> None:
    found = []
    for path in sorted((ROOT / "ctx_distill").rglob("*.py")):
        if "node_modules" in path.parts or path.relative_to(ROOT / "ctx_distill").as_posix() in IN_A_CHECKOUT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and MAKE.search(node.value):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {MAKE.search(node.value)}")
    assert found == []


@pytest.mark.full
def test_the_package_imports_without_faiss() -> None:
    program = (
        "import importlib.metadata, sys\n"
        "sys.modules['faiss'] = None\n"
        "real = importlib.metadata.distributions\n"
        "importlib.metadata.distributions = lambda: [d for d in real() if 'faiss' not in (d.metadata['Name'] or '')]\n"
        "import ctx_distill.retrieval.index as index, ctx_distill.stages.index.task\n"
        "index.faiss_module()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install "ctx-distill[cpu]"' in done.stderr


def test_the_wheelhouse_lists_the_hash_of_each_wheel(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "requirements"))
    try:
        from wheelhouse import write_requirements
    finally:
        sys.path.pop(0)
    for name in ("small_thing-1.0", "other-2.0+cpu"):
        folder = name.split("-")[0]
        version = name.split("-")[1]
        with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
            info = f"{name}.dist-info"
            wheel.writestr(f"{folder}.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {folder}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    assert write_requirements(tmp_path) == 2
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "new")], check=True)
    install = [str(tmp_path / "new" / "bin" / "pip"), "install", "--quiet", "--no-index", "--find-links", str(tmp_path),
               "--require-hashes", "--requirement", str(tmp_path / "requirements.txt")]  # fmt: skip
    subprocess.run(install, check=True)
    with (tmp_path / "other-2.0+cpu-py3-none-any.whl").open("ab") as wheel:
        wheel.write(b"changed")
    changed = subprocess.run([*install, "--force-reinstall"], capture_output=True, text=True)
    assert changed.returncode != 0
    assert "hash" in changed.stderr.lower()

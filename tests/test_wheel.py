"""The built wheel: what it holds, and that it runs without the checkout."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import ctx_distill

ROOT = Path(__file__).parents[1]
PRESET = ROOT / "tests" / "conf" / "wheel.yaml"
NIIVUE = "ctx_distill/explorer/viewer/node_modules/@niivue/niivue"
BUILT_FROM = (".gitignore", "LICENSE", "README.md", "pyproject.toml")
NOT_SHIPPED = ("__pycache__", "node_modules")


def source_tree(folder: Path) -> Path:
    """Return a copy of what the wheel is built from, without NiiVue."""
    for name in ("ctx_distill", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, folder)
    return folder


def build(source: Path, folder: Path) -> Path:
    """Build the wheel of a source tree without a network."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=source, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without NiiVue."""
    folder = tmp_path_factory.mktemp("wheel")
    return build(source_tree(folder / "source"), folder / "dist")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # Python does not read the .pth files of a folder that a .pth file adds, so the editable checkout stays out.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *arguments: str, cwd: Path, status: int = 0) -> str:
    """Run the environment's Python without this checkout on its path, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["OMP_NUM_THREADS"] = "1"  # on so little data threads only wait for each other
    done = subprocess.run([str(python), *arguments], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_package_data_and_metadata_are_in_the_wheel(wheel: Path) -> None:
    data = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ctx_distill").rglob("*")
        if path.is_file() and not set(path.parts) & set(NOT_SHIPPED)
    }
    stages = {
        f"ctx_distill/_stages/{path.relative_to(ROOT / 'stages').as_posix()}"
        for path in (ROOT / "stages").rglob("*")
        if path.is_file()
    }
    assert {"ctx_distill/py.typed", "ctx_distill/text/vocabularies/ct_rate.yaml", "ctx_distill/explorer/static/explorer.js",
            "ctx_distill/reporting/templates/page.html.j2"} < data  # fmt: skip
    assert {"ctx_distill/_stages/base.yaml", "ctx_distill/_stages/slurm/job.sbatch"} < stages
    info = f"ctx_distill-{ctx_distill.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert {name for name in names if not name.startswith(info)} == data | stages
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/ctx_distill/explorer/viewer/LICENSE-niivue.txt"} < names
    assert metadata["Version"] == ctx_distill.__version__
    assert {"cpu", "gpu", "serve"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_wheel_holds_niivue_and_its_licences_once_npm_has_placed_it(tmp_path: Path) -> None:
    source = source_tree(tmp_path / "source")
    placed = [f"{NIIVUE}/dist/index.js", f"{NIIVUE}/../../fflate/LICENSE", f"{NIIVUE}/../../@lukeed/uuid/license"]
    other = [f"{NIIVUE}/dist/index.js.map", f"{NIIVUE}/../../fflate/index.js"]
    for name in (*placed, *other):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    with zipfile.ZipFile(build(source, tmp_path / "dist")) as archive:
        names = {name for name in archive.namelist() if "node_modules" in name}
    assert names == {os.path.normpath(name) for name in placed}


@pytest.mark.slow
@pytest.mark.timeout(1500)  # 80 s on two idle cores
def test_the_smallest_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    command = str(installed.parent / "ctx-distill")
    preset = tmp_path / "small.yaml"
    shutil.copy(PRESET, preset)
    arguments = ["--data", "data", "--run", "run", "--preset", str(preset)]

    where = run(installed, "-c", "import ctx_distill; print(ctx_distill.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parents[1])
    assert run(installed, command, "--version", cwd=tmp_path).strip() == ctx_distill.__version__
    presets = (
        "from ctx_distill.runs.stage_table import load_preset as load; [load(p) for p in ('demo', 'base', 'large')]"
    )
    run(installed, "-c", presets, cwd=tmp_path)

    run(installed, command, "phantom", "data", "--ct", "16", "--xray", "24", "--seed", "5", cwd=tmp_path)
    printed = run(installed, command, "all", *arguments, cwd=tmp_path)
    assert "run/index.html" in printed
    assert str(ROOT) not in (tmp_path / "run" / "run.json").read_text()
    assert "complete in run/align (--force reruns it)" in run(installed, command, "align", *arguments, cwd=tmp_path)

    program = (
        "import ctx_distill, json, pathlib, sys\n"
        "model = ctx_distill.load('run')\n"
        "result = model.predict(next(pathlib.Path('data').glob('ct/*.nii.gz')), saliency=True, report=True)\n"
        "print(json.dumps(result.to_dict()))\n"
        f"assert not [path for path in sys.path if path == {str(ROOT)!r}]\n"
    )
    result = json.loads(run(installed, "-W", "ignore", "-c", program, cwd=tmp_path).splitlines()[-1])
    assert result["asked"] == "classifier"
    assert result["probabilities"]

    message = run(installed, command, "serve", "run", "--port", "0", cwd=tmp_path, status=2)
    assert "NiiVue" in message
    assert "make wheel" in message

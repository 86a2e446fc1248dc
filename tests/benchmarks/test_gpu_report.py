"""The framework of `make gpu-report`: time limits, resumption, wheels in pieces, requirements, pages. No part of it here."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
QUICK = """
TITLE = "quick"
def run(context):
    for name in ("one", "two"):
        if context.wanted(name):
            yield {"name": name, "value_s": 1.5, "finished": sorted(context.finished)}
"""
ENDLESS = """
import subprocess, sys, time
from pathlib import Path
TITLE = "endless"
def run(context):
    yield {"name": "first"}
    inside = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"
    for number, outside in enumerate((False, True)):
        child = subprocess.Popen([sys.executable, "-c", inside], stdout=subprocess.PIPE, start_new_session=outside)
        (context.work / f"pid-{number}").write_text(child.stdout.readline().decode())
    time.sleep(600)
    yield {"name": "second"}
"""
FAILING = """
TITLE = "failing"
def run(context):
    yield {"name": "before"}
    raise RuntimeError("not on this machine")
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def report(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`report("quick", "endless", ...)`: run these parts without an environment of their own; returns status and report."""
    import gpu_report
    from gpu import machine

    parts = tmp_path / "parts"
    parts.mkdir()
    for name, text in (("quick", QUICK), ("endless", ENDLESS), ("failing", FAILING)):
        (parts / f"{name}_part.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(parts))
    monkeypatch.setattr(machine.Environment, "_probe", lambda self, folders: {"torch": "none", "gpus": 0})
    monkeypatch.setattr(gpu_report, "PARTS", {name: (f"{name}_part", 10.0) for name in ("quick", "endless", "failing")})

    def run(*names: str, limit: float = 40.0, more: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
        words = ["gpu_report", "--device", "cpu", "--scale", "small", "--limit", str(limit), "--out", str(tmp_path / "out"),
                 "--work", str(tmp_path / "work"), "--parts", *names, *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", words)
        status = gpu_report.main()
        return status, json.loads((tmp_path / "out" / "report.json").read_text())

    return run


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_part_beyond_its_limit_is_ended_with_all_it_started_and_the_others_stand(report: Any, tmp_path: Path) -> None:
    began = time.monotonic()
    status, found = report("quick", "endless", "failing", limit=23.0)  # 15 of them are kept for ending and writing
    assert status == 1
    assert time.monotonic() - began < 40
    parts = found["parts"]
    assert [parts[name]["state"] for name in ("quick", "endless", "failing")] == ["done", "stopped", "failed"]
    assert [row["name"] for row in parts["quick"]["rows"]] == ["one", "two"]
    assert [row["name"] for row in parts["endless"]["rows"]] == ["first"]
    assert [row["name"] for row in parts["failing"]["rows"]] == ["before"]
    assert parts["endless"]["error"].startswith("its time was over")
    assert "not on this machine" in parts["failing"]["error"]
    pids = [int((tmp_path / "work" / f"pid-{number}").read_text()) for number in (0, 1)]
    assert not [pid for pid in pids if alive(pid)]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| endless | endless | stopped | 1 |" in page
    assert not list((tmp_path / "out").glob("*.partial"))
    # what comes back from the machine: few files in one folder
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json", "report.md", "log.txt", "part_quick.json", "part_endless.json", "part_failing.json"
    }  # fmt: skip


def test_what_is_done_is_not_repeated_and_what_was_stopped_resumes(report: Any, tmp_path: Path) -> None:
    assert report("quick")[0] == 0
    result = tmp_path / "out" / "part_quick.json"
    before = result.read_text()
    assert report("quick")[0] == 0
    assert result.read_text() == before
    facts = json.loads(before)
    result.write_text(
        json.dumps({**facts, "state": "stopped", "rows": [facts["rows"][0], {"name": "two", "error": "x"}]})
    )
    _, found = report("quick")
    rows = found["parts"]["quick"]["rows"]
    assert [(row["name"], row["finished"]) for row in rows] == [("one", []), ("two", ["one"])]
    _, found = report("quick", more=("--again",))
    assert [row["finished"] for row in found["parts"]["quick"]["rows"]] == [[], []]


def test_a_killed_report_leaves_no_part_running(tmp_path: Path, gpu: None) -> None:
    script = tmp_path / "run.py"
    (tmp_path / "endless_part.py").write_text(ENDLESS)
    (tmp_path / "work").mkdir()
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom gpu.context import Context\n"
        "from gpu.runner import Stopped, child_command, supervise\n"
        f"out = Path({str(tmp_path)!r})\n"
        "context = Context('cpu', 'small', out / 'work', 0.0, False, out)\n"
        f"command = child_command(Path({str(BENCHMARKS / 'gpu_report.py')!r}), 'e', 'endless_part', context, out / 'part_e.json')\n"
        "try:\n"
        "    supervise(command, dict(os.environ), out / 'part_e.json', out / 'log', 100.0, lambda row: None)\n"
        "except Stopped:\n    sys.exit(143)\n"
    )
    variables = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, str(script)], env=variables)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "work" / "pid-1").exists() and (tmp_path / "work" / "pid-1").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 143
    facts = json.loads((tmp_path / "part_e.json").read_text())
    assert facts["state"] == "stopped"
    assert facts["error"].startswith("the report was stopped")
    assert not [number for number in (0, 1) if alive(int((tmp_path / "work" / f"pid-{number}").read_text()))]


def test_time_that_one_part_leaves_goes_to_the_others(gpu: None) -> None:
    from gpu.runner import limits_of

    assert limits_of({"a": 100, "b": 300}, 200) == {"a": 50, "b": 150}
    assert limits_of({"b": 300}, 190) == {"b": 190}


def test_wheels_are_split_and_joined_and_a_wrong_one_is_refused(tmp_path: Path, gpu: None) -> None:
    from gpu.wheels import join, missing_pieces, split

    wheels = [tmp_path / "one-1-py3-none-any.whl", tmp_path / "two-1-py3-none-any.whl"]
    for number, wheel in enumerate(wheels):
        wheel.write_bytes(bytes((7 * i + number) % 251 for i in range(2500 + 700 * number)))
    folders = split(wheels, tmp_path, "set", size=1000)
    assert [folder.name for folder in folders] == [f"set-{n}" for n in range(1, 7)]
    for folder in folders:
        assert sum(path.stat().st_size for path in folder.iterdir() if path.name != "pieces.json") <= 1000
    joined = join(tmp_path, "set", tmp_path / "joined")
    assert [path.read_bytes() for path in joined] == [wheel.read_bytes() for wheel in wheels]

    piece = sorted(folders[0].glob("one*"))[0]
    right = piece.read_bytes()
    piece.write_bytes(bytes([right[0] ^ 1]) + right[1:])
    (tmp_path / "joined" / "one-1-py3-none-any.whl").unlink()
    with pytest.raises(ValueError, match=r"one-1.*SHA-256 .*, expected"):
        join(tmp_path, "set", tmp_path / "joined")
    assert not list((tmp_path / "joined").glob("one*"))
    piece.unlink()
    assert "1,500 of 2,500 bytes" in missing_pieces(tmp_path, "set")
    with pytest.raises(ValueError, match="1,500 of 2,500"):
        join(tmp_path, "set", tmp_path / "joined")


TOP_LEVEL = {
    "PIL": "pillow", "SimpleITK": "simpleitk", "faiss": "faiss-cpu", "open_clip": "open-clip-torch",
    "sklearn": "scikit-learn", "tensorboardX": "tensorboardx", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub",
    "docstring_parser": "docstring-parser",
}  # fmt: skip
NOT_NEEDED = {"s3fs", "fastapi", "starlette", "uvicorn", "pycocoevalcap", "radeval", "RadEval"}
"""Of the extras s3, serve, report and radeval, which no part uses."""


def test_machine_and_wheels_together_have_all_that_the_package_imports(gpu: None) -> None:
    from gpu.wheels import requirements_of

    machine, wheels = (
        set(requirements_of((ROOT / "requirements" / name).read_text()))
        for name in ("gpu-machine.txt", "gpu-wheels.txt")
    )
    assert not machine & wheels
    imported = set()
    for path in (ROOT / "ctx_distill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.split(".")[0] for name in names}
    third_party = imported - set(sys.stdlib_module_names) - {"ctx_distill", ""} - NOT_NEEDED
    assert len(third_party) > 20
    assert {TOP_LEVEL.get(name, name) for name in third_party} <= machine | wheels


def test_the_machine_s_versions_are_within_the_bounds_of_the_package(gpu: None) -> None:
    from gpu.wheels import requirements_of
    from packaging.requirements import Requirement

    pinned: dict[str, str] = {}
    for name in ("gpu-machine.txt", "gpu-wheels.txt"):
        for package, entry in requirements_of((ROOT / "requirements" / name).read_text()).items():
            pinned[package] = entry.split("==")[1].split()[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["cpu"]]]
    assert len(needed) > 20
    for requirement in needed:
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]}, expected {requirement}"


def test_every_entry_of_the_requirements_is_pinned_and_hashed(gpu: None) -> None:
    from gpu.wheels import requirements_of

    for name in ("gpu-machine.txt", "gpu-wheels.txt", "gpu-faiss.txt"):
        entries = requirements_of((ROOT / "requirements" / name).read_text())
        assert entries
        for entry in entries.values():
            assert re.match(r"[a-z0-9.-]+==[^ ]+ ", entry)
            assert "--hash=sha256:" in entry


def part(state: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"title": "t", "module": "gpu.part_d", "state": state, "rows": rows, "targets": [
        {"what": "speed", "value": 2.0, "reached": True}, {"what": "memory", "value": 70.0, "reached": False},
    ]}  # fmt: skip


def write_report_of(folder: Path, device: str, **parts: Any) -> Path:
    folder.mkdir(parents=True)
    report = {
        "device": device, "scale": "full" if device == "cuda" else "small", "date": "2030-01-02", "code": "abc", "notes": [],
        "machine": {"cores": 16, "memory_gb": 128.0, "python": "3.12.3", "driver": "999.1"},
        "packages": {"torch": "2.11.0", "cuda": "13.0", "gpu": "NVIDIA X9" if device == "cuda" else None, "gpu_memory_gb": 80.0},
        "parts": parts,
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_pages_name_the_hardware_and_say_what_was_not_measured(tmp_path: Path, gpu: None) -> None:
    from gpu.report import NOTHING, write_docs

    docs = tmp_path / "docs"
    docs.mkdir()
    sections = "".join(
        f"<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in ("results", "gpu training", "gpu index")
    )
    for page in ("gpu.md", "scaling.md"):
        (docs / page).write_text(f"before\n{sections}after\n")
    row = {"name": "exact, gpu", "build_s": 3.0, "ms_1": 0.25, "recall_at_1": 1.0}
    other = {"name": "copy", "bytes_s": 4e12, "ms_1": 1.0}
    rehearsed = write_report_of(tmp_path / "cpu", "cpu", d=part("done", [row]))
    write_docs(docs, [rehearsed])
    page = (docs / "gpu.md").read_text()
    assert NOTHING in page
    assert "Rehearsal on a CPU" in page
    assert "old" not in page.split("<!-- end of results -->")[0]
    assert (docs / "scaling.md").read_text().count(NOTHING) == 2

    first = write_report_of(tmp_path / "first", "cuda", d=part("stopped", []))
    second = write_report_of(
        tmp_path / "second", "cuda", d=part("done", [row, other, {"name": "ivf", "error": "out of memory"}])
    )
    write_docs(docs, [first, second])
    page = (docs / "gpu.md").read_text()
    assert NOTHING not in page
    assert "NVIDIA X9, 80.0 GB, 16 CPU cores, 128 GB, Python 3.12.3, torch 2.11.0, CUDA 13.0, driver 999.1" in page
    assert "| exact, gpu | 3.0 | 0.250 | 1.000 |" in page
    assert "- copy: bytes_s 4e+12, ms_1 1\n" in page
    assert "- ivf: FAILED: out of memory" in page
    assert "- speed: 2.000, reached" in page
    assert "- memory: 70.000, **NOT reached**" in page
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "| exact, gpu | 3.0 | 0.250 | 1.000 |" in (docs / "scaling.md").read_text()


def test_the_pages_of_this_repository_have_the_sections(tmp_path: Path, gpu: None) -> None:
    from gpu.report import replace_section

    assert replace_section((ROOT / "docs" / "gpu.md").read_text(), "results", "x")
    for name in ("gpu training", "gpu index"):
        assert replace_section((ROOT / "docs" / "scaling.md").read_text(), name, "x")


def test_rows_of_a_program_are_followed_while_it_runs(tmp_path: Path, gpu: None) -> None:
    from gpu.follow import follow, lines_of

    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "with open(sys.argv[1], 'a') as out:\n"
        '    out.write(\'{"name": "one"}\\n{"na\'); out.flush()\n'
        "    while not __import__('pathlib').Path(sys.argv[1] + '.seen').exists(): time.sleep(0.05)\n"
        '    out.write(\'me": "two"}\\n\')\n'
        "sys.exit(3)\n"
    )
    path = tmp_path / "rows"
    rows = follow([sys.executable, str(program), str(path)], path, lines_of, allowed=(0, 3))
    assert next(rows) == {"name": "one"}
    Path(f"{path}.seen").touch()
    assert [row["name"] for row in rows] == ["two"]
    with pytest.raises(RuntimeError, match=r"program\.py ended with status 3"):
        list(follow([sys.executable, str(program), str(path)], path, lines_of))

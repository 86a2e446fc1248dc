"""Runs of stages that are killed and finished: started out of one warm process, stopped by SIGKILL to the whole group.

`Runner` keeps a process that has imported what a stage needs and forks a run from it, so that the seconds of imports are paid
once. The run is the leader of a process group of its own; its DataLoader workers belong to that group.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "expert": "expert", "index": "index", "distill": "distill", "align": "align", "zero-shot": "zero_shot",
    "classifier": "classifier", "report": "report",
}  # fmt: skip
TRAINED = ("expert", "distill", "align", "classifier", "report")
TIMINGS = ("lookup_ms", "lookup_share")
CHECKPOINTS = {
    "last.ckpt": ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "ctx_distill"),
    "best.ckpt": ("state_dict",),
}
EVERY_BATCH = "--model.init_args.survival.checkpoint_minutes=1e-6"
"""A checkpoint before every batch, so that runs of seconds are stopped in mid-epoch."""


def _state(process: int) -> str:
    """The letter that Linux gives to what a process is doing."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


class Runner:
    """A warm process that forks runs of `ctx-distill`."""

    def __init__(self, data: Path, preset: Path, workers: int = 0, more: tuple[str, ...] = ()) -> None:
        self.data, self.preset = data, preset
        self.more = [f"--data.init_args.num_workers={workers}", *more]
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert self._ask({"hello": 1})

    def _ask(self, what: dict[str, Any]) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(what) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, stage: str, run: Path) -> int:
        """Begin a stage; returns its process and group id."""
        run.mkdir(parents=True, exist_ok=True)
        arguments = self.arguments(stage, run)
        return int(self._ask({"run": arguments, "log": str(run / f"{stage}.log")}))

    def arguments(self, stage: str, run: Path) -> list[str]:
        """What `start` gives to the command line."""
        more = [*self.more, EVERY_BATCH] if stage in TRAINED else self.more
        return [stage, "--data", str(self.data), "--run", str(run), "--preset", str(self.preset), *more]

    def wait(self, process: int) -> int:
        """Its exit status, 128 + signal where one ended it."""
        return int(self._ask({"wait": process}))

    def ended(self, process: int) -> bool:
        """Whether it has ended, without waiting."""
        with contextlib.suppress(OSError):
            return _state(process) == "Z"
        return True

    def finish(self, stage: str, run: Path) -> None:
        """Run a stage to its end."""
        status = self.wait(self.start(stage, run))
        assert status == 0, f"{stage} ended with {status}:\n{(run / f'{stage}.log').read_text()[-3000:]}"

    def kill_in_write(self, process: int, run: Path, stage: str, count: int) -> bool:
        """Kill within the count-th checkpoint write from now or a later one; whether there was one.

        The group is halted first: what is killed is what was seen to be in the write.
        """
        part = run / FOLDERS[stage] / "checkpoints" / ".last.ckpt.part"
        seen, there = 0, False
        while not self.ended(process):
            now = part.exists()
            seen += now and not there
            there = now
            if not now or seen < count:
                continue
            os.killpg(process, signal.SIGSTOP)
            while not self.ended(process) and _state(process) != "T":
                time.sleep(0.0001)
            within = part.exists()
            os.killpg(process, signal.SIGKILL if within else signal.SIGCONT)
            if within:
                return True
        return False

    def kill_when(self, process: int, moment: Callable[[], bool], seconds: float = 120) -> bool:
        """Kill the whole group once `moment()` holds; False where the run ended before."""
        end = time.monotonic() + seconds
        while not moment():
            if self.ended(process):
                return False
            assert time.monotonic() < end, "the moment to kill at did not come"
        os.killpg(process, signal.SIGKILL)
        return True

    def close(self) -> None:
        """End the warm process."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(30)


def with_upstream(reference: Path, stage: str, run: Path) -> Path:
    """A copy of a finished run as it stood before a stage."""
    names = list(FOLDERS)
    run.mkdir(parents=True)
    for name in names[: names.index(stage)]:
        shutil.copytree(reference / FOLDERS[name], run / FOLDERS[name])
    shutil.copy(reference / "run.json", run / "run.json")
    return run


def fingerprints(run: Path, stage: str) -> dict[str, str]:
    """SHA-256 of what a stage left: weights, optimiser state, predictions, metrics and curves without timings, data order."""
    folder = run / FOLDERS[stage]
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".safetensors", ".faiss") or name in (
            "predictions.csv",
            "reports.csv",
            "retrieval.csv",
            "corrected.csv",
            "training.json",
        ):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop("timing", None)
    found["metrics.json"] = hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()
    curves = folder / "logs" / "metrics.csv"
    if curves.is_file():
        import pandas as pd

        table = pd.read_csv(curves)
        table = table[sorted(c for c in table.columns if not c.endswith(TIMINGS))]
        found["metrics.csv"] = hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()
    for name, parts in CHECKPOINTS.items():
        if (folder / "checkpoints" / name).is_file():
            import torch

            content = torch.load(folder / "checkpoints" / name, map_location="cpu", weights_only=True)
            logged = content.get("ctx_distill", {}).get("logged", {})
            for timing in [key for key in logged if key.endswith(TIMINGS)]:
                del logged[timing]
            found |= {f"{name} {part}": hash_tree(content[part]) for part in parts}
    return found


def hash_tree(value: Any) -> str:
    """SHA-256 of nested dicts and lists of tensors and plain values."""
    import torch

    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, dict):
            for key in sorted(item, key=str):
                digest.update(f"k{key}".encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            digest.update(f"l{len(item)}".encode())
            for one in item:
                add(one)
        elif isinstance(item, torch.Tensor):
            digest.update(f"t{item.dtype}{tuple(item.shape)}".encode())
            digest.update(
                item.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                if item.ndim
                else repr(item.item()).encode()
            )
        else:
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()


def _serve() -> None:
    import ctx_distill.commands.main
    import ctx_distill.runs.lightning_cli
    import ctx_distill.stages.align.task
    import ctx_distill.stages.classifier.task
    import ctx_distill.stages.distill.task
    import ctx_distill.stages.expert.task
    import ctx_distill.stages.report.task
    import ctx_distill.stages.zero_shot.task  # noqa: F401

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        task = json.loads(line)
        if "run" in task:
            child = os.fork()
            if child == 0:
                _run(task["run"], task["log"])
            replies.write(json.dumps(child) + "\n")
        elif "wait" in task:
            _, status = os.waitpid(task["wait"], 0)
            code = os.waitstatus_to_exitcode(status)
            replies.write(json.dumps(code if code >= 0 else 128 - code) + "\n")
        else:
            replies.write("true\n")


def _run(arguments: list[str], log: str) -> None:
    import multiprocessing.util
    import traceback

    from ctx_distill.commands.main import main

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit it ignored
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 1
    try:
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    os._exit(status)


if __name__ == "__main__":
    _serve()

"""A pool of gloo processes on loopback that runs functions of test files as ranks.

    pool(2).run(__file__, "rank_of_mean", {"x": x})   ->   [what rank 0 returned, what rank 1 returned]

Tests load this file by its path (`tests` is no package): `tests/conftest.py` does. The processes are
this very file run as a script, started once a session and fed one JSON line a task, so that importing torch is paid
once; functions are found by file and name, so that nothing has to be pickled. Inputs and results (tensors, numbers,
dicts, lists) travel as torch files.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

TIMEOUT = 180


class Pool:
    """`size` ranks, alive until the session ends; `backend` of the process group, see `torch.distributed`."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory(prefix="ctx-ddp-")
        self.tasks = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(size), f"{self.folder.name}/rendezvous", backend],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd=Path(__file__).parents[2],
                text=True,
                bufsize=1,
            )
            for rank in range(size)
        ]
        atexit.register(self.close)

    def run(self, file: str, function: str, arguments: dict[str, Any]) -> list[Any]:
        """Call `function(**arguments)` of a file on every rank; a failing or silent rank ends the pool."""
        import torch

        self.tasks += 1
        stem = f"{self.folder.name}/{self.tasks}"
        torch.save(arguments, f"{stem}-in.pt")
        for process in self.processes:
            process.stdin.write(json.dumps({"file": file, "function": function, "stem": stem}) + "\n")
        replies = []
        for process in self.processes:
            ready, _, _ = select.select([process.stdout], [], [], TIMEOUT)
            replies.append(json.loads(process.stdout.readline() or '"ended"') if ready else "silent")
        if any(reply != "ok" for reply in replies):
            self.close()
            pool.cache_clear()
            raise AssertionError("\n".join(f"rank {rank}: {reply}" for rank, reply in enumerate(replies)))
        return [torch.load(f"{stem}-out-{rank}.pt", weights_only=True) for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.folder.cleanup()
        atexit.unregister(self.close)


def forget_former_runs() -> None:
    """Make this process unseeded and rank 0 again: Lightning keeps both for the whole process, whoever set them."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LOCAL_RANK"):
        os.environ.pop(name, None)
    if "lightning_utilities.core.rank_zero" in sys.modules:
        sys.modules["lightning_utilities.core.rank_zero"].rank_zero_only.rank = 0


@functools.cache
def pool(size: int) -> Pool:
    """The session's pool of this size."""
    return Pool(size)


def _load(file: str) -> Any:
    name = "ranks_of_" + Path(file).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _serve(rank: int, size: int, rendezvous: str, backend: str) -> None:
    import datetime

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a function prints must not look like a reply
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=120)
    )
    for line in sys.stdin:
        task = json.loads(line)
        forget_former_runs()
        try:
            arguments = torch.load(f"{task['stem']}-in.pt", weights_only=True)
            result = getattr(_load(task["file"]), task["function"])(**arguments)
            torch.save(result, f"{task['stem']}-out-{rank}.pt")
            reply = "ok"
        except Exception:
            reply = traceback.format_exc()
        replies.write(json.dumps(reply) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])

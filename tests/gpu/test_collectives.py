"""The collectives of `distributed.py` on tensors of the device: NCCL with one rank, and two ranks that share the GPU.

Of one rank `distributed.py` makes no collective at all, so its autograd function and the calls underneath are run as several
ranks would run them. NCCL refuses two ranks on one GPU; gloo takes tensors of a GPU and shows where they must be.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ctx_distill import distributed

pytestmark = pytest.mark.gpu

TWO = """
import sys, torch, torch.distributed as dist
from ctx_distill import distributed as d
rank, device, folder = int(sys.argv[1]), torch.device(sys.argv[2]), sys.argv[3]
dist.init_process_group("cpu:gloo,cuda:gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
x = torch.arange(2.0 + rank, device=device)[:, None] + 10 * rank
x.requires_grad_()
whole = d.gather_with_gradient(x)
assert whole.device == x.device and whole[:, 0].tolist() == [0, 1, 10, 11, 12], whole
(whole * torch.arange(5, device=device)[:, None]).sum().backward()
assert x.grad[:, 0].tolist() == ([0, 2], [4, 6, 8])[rank], x.grad
rows = torch.tensor([[5, 6], [6, 7, 8]][rank], device=device)
assert d.own_first_rows(rows).tolist() == ([True, True], [False, True, True])[rank]
flags = d.gather_with_gradient(torch.tensor([[True, False], [True, True, False]][rank], device=device))
assert flags.dtype == torch.bool and flags.tolist() == [True, False, True, True, False]
assert abs(float(d.global_mean(x.detach()[:, 0])) - 34 / 5) < 1e-6
assert d.gather_objects([rank]) == [0, 1]
assert d.any_rank(rank == 1, False) == [True, False]
assert d.gather_row_counts(len(x), device) == [2, 3]
d.barrier()
dist.destroy_process_group()
print("agreed")
"""


@pytest.fixture
def one_rank(device: torch.device, backend: str, tmp_path: Path) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_s_collectives(one_rank: None, device: torch.device) -> None:
    x = torch.arange(6.0, device=device).reshape(3, 2).requires_grad_()
    whole = distributed._GatherRows.apply(x, [3])
    assert whole.device.type == device.type
    (whole * torch.tensor([[1.0, 2.0]], device=device)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 2]] * 3
    parts: list[list[str] | None] = [None]
    dist.all_gather_object(parts, ["a word"])
    assert parts == [["a word"]]
    flags = torch.tensor([1, 0])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=distributed.host_group())
    assert flags.tolist() == [1, 0]
    dist.barrier()
    assert distributed.gather_with_gradient(x) is x
    assert distributed.any_rank(True, False) == [True, False]


def test_two_ranks_of_one_device(device: torch.device, tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), device.type, str(tmp_path)], env=environment, text=True, stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            printed, _ = rank.communicate(timeout=120)
            assert rank.returncode == 0, printed
            assert "agreed" in printed
    finally:
        for rank in ranks:
            rank.kill()

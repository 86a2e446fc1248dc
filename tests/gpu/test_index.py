"""The X-ray index on a GPU gives the CPU's neighbours; in a rehearsal the CPU index takes its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ctx_distill.retrieval.build_index import construct
from ctx_distill.retrieval.index import Device, XrayIndex, faiss_module

pytestmark = pytest.mark.gpu


@pytest.fixture
def place(device: torch.device) -> Device:
    """Where FAISS searches; the reason where it cannot use this GPU."""
    if device.type == "cpu":
        return "cpu"
    faiss = faiss_module()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        pytest.skip("the installed faiss has no GPU support; install faiss-gpu-cuvs in place of faiss-cpu")
    return "gpu"


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_the_same_neighbours_as_on_the_cpu(kind: Any, place: Device, device: torch.device) -> None:
    draw = np.random.default_rng(0)
    distinct = draw.standard_normal((3000, 64)).astype(np.float32)
    keys = distinct[np.r_[np.arange(3000), np.arange(500), np.full(300, 7)]]  # pairs of equal keys, and 301 of one
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    queries = torch.from_numpy(np.concatenate([keys[:40], keys[7:8], -keys[:23]]))
    cpu = construct(keys, kind, device="cpu")
    index = XrayIndex(cpu._cpu, kind, place, equal=cpu.equal)
    assert index.on_gpu == (place == "gpu")
    expected, found = cpu.search(queries, 8), index.search(queries.to(device), 8)
    assert found[0].device.type == found[1].device.type == device.type
    if kind == "exact":
        assert torch.equal(found[1].cpu(), expected[1])
        assert torch.equal(found[0].cpu(), expected[0])
    else:  # which of equal keys comes first is not promised
        torch.testing.assert_close(found[0].cpu(), expected[0], atol=1e-5, rtol=0)
    alone = torch.cat([index.search(query[None].to(device), 8)[0] for query in queries])
    torch.testing.assert_close(alone, found[0], atol=0 if kind == "exact" else 1e-5, rtol=0)

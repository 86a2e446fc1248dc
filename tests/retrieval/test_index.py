"""The FAISS index against brute force, its files, and faiss beside torch and forks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.retrieval import index as index_module
from ctx_distill.retrieval.build_index import build_index, recall_at_1
from ctx_distill.retrieval.index import XrayIndex, refuse_two_faiss
from ctx_distill.retrieval.sharded import ShardedIndex
from ctx_distill.types import InputError


def unit(rows: int, dimension: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute(keys: Tensor, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.double().numpy() @ keys.double().numpy().T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_exact_equals_brute_force(batch: int) -> None:
    keys, queries = unit(500, 24, 0), unit(batch, 24, 1)
    similarity, position = build_index(keys).search(queries, 9)
    expected, order = brute(keys, queries, 9)
    assert (similarity.dtype, position.dtype) == (torch.float32, torch.int64)
    assert np.allclose(similarity, expected, atol=1e-5)
    assert np.array_equal(position, order)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_indexes_measure_their_recall_and_leave_no_place_empty(kind: str) -> None:
    keys, queries = unit(2000, 16, 0), unit(50, 16, 1)
    index = build_index(keys, kind)  # type: ignore[arg-type]
    assert index.recall is not None
    assert 0.7 < index.recall <= 1
    _, position = index.search(queries, 3)
    assert (position[:, 0].numpy() == brute(keys, queries, 1)[1][:, 0]).mean() > 0.7
    # More neighbours than a few lists hold: FAISS would leave -1.
    similarity, position = index.search(queries, 1900)
    assert (position >= 0).all()
    assert all(len(set(row)) == 1900 for row in position.tolist())
    assert (similarity[:, :-1] >= similarity[:, 1:]).all()


def test_unreachable_keys_of_a_graph_are_found() -> None:
    keys = torch.cat([unit(1, 8, 0).expand(300, 8), unit(20, 8, 1)])  # many duplicates break HNSW graphs
    index = build_index(keys, "hnsw")
    _, position = index.search(unit(5, 8, 2), 320)
    assert all(sorted(row) == list(range(320)) for row in position.tolist())


def test_low_recall_is_refused() -> None:
    keys = unit(3000, 64, 0)
    with pytest.raises(
        InputError, match=r"recall@1 of the ivf index is 0\.\d+; expected at least 0\.999.*search_width \(now 1\)"
    ):
        build_index(keys, "ivf", search_width=1, probes=unit(100, 64, 1), minimum_recall=0.999)
    assert recall_at_1(build_index(keys), keys, unit(10, 64, 2)) == 1


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_round_trip(tmp_path: Path, kind: str) -> None:
    keys, queries = unit(400, 12, 0), unit(5, 12, 1)
    index = build_index(keys, kind)  # type: ignore[arg-type]
    index.save(tmp_path / "index.faiss")
    loaded = XrayIndex.load(tmp_path / "index.faiss")
    assert (loaded.kind, len(loaded), loaded.dimension, loaded.on_gpu) == (kind, 400, 12, False)
    for mine, theirs in zip(index.search(queries, 4), loaded.search(queries, 4), strict=True):
        assert torch.equal(mine, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]
    if sys.platform == "linux":
        assert str(tmp_path / "index.faiss") in Path("/proc/self/maps").read_text()


def test_one_item_and_an_empty_batch() -> None:
    index = build_index(unit(1, 4, 0), "ivf")
    assert index.search(unit(2, 4, 1), 1)[1].tolist() == [[0], [0]]
    assert index.search(torch.zeros(0, 4), 1)[0].shape == (0, 1)


def test_bad_queries_and_keys_are_refused() -> None:
    index = build_index(unit(5, 4, 0))
    with pytest.raises(InputError, match="3 dimensions, the X-ray index 4"):
        index.search(unit(2, 3, 0), 1)
    for k in (0, 6):
        with pytest.raises(InputError, match=f"{k} neighbours requested from an index of 5"):
            index.search(unit(2, 4, 0), k)
    with pytest.raises(InputError, match="no X-rays to index"):
        build_index(torch.zeros(0, 4))
    keys = unit(5, 4, 0)
    keys[3, 1] = float("nan")
    with pytest.raises(InputError, match="key 3 of the X-ray index is not finite"):
        build_index(keys)
    with pytest.raises(InputError, match="FAISS has no GPU"):
        build_index(unit(5, 4, 0), device="gpu")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    with pytest.raises(InputError, match=r"no X-ray index. Run stage 1"):
        XrayIndex.load(path)
    build_index(unit(100, 8, 0)).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"not an index at all", whole[:20], whole[: len(whole) // 2], b"\0" * 100):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"not a readable FAISS index"):
            XrayIndex.load(path)


def _installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = [SimpleNamespace(metadata={"Name": name}) for name in ("torch", "faissify", *names)]
    monkeypatch.setattr(index_module.importlib.metadata, "distributions", lambda: found)


def test_exactly_one_faiss_may_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in ("faiss-cpu", "faiss_gpu_cuvs", "faiss-gpu"):
        _installed(monkeypatch, one)
        refuse_two_faiss()
    _installed(monkeypatch)
    with pytest.raises(InputError, match=r"ctx-distill\[cpu\].*ctx-distill\[gpu\]"):
        refuse_two_faiss()
    _installed(monkeypatch, "faiss_cpu", "faiss-gpu-cuvs")
    with pytest.raises(InputError, match=r"faiss-cpu and faiss-gpu-cuvs .* pip uninstall -y faiss-cpu faiss-gpu-cuvs"):
        refuse_two_faiss()


def test_importing_the_package_does_not_import_faiss() -> None:
    code = "import sys, ctx_distill.retrieval.lookup; assert 'faiss' not in sys.modules; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class Asking(torch.utils.data.Dataset[Tensor]):
    """A dataset that looks neighbours up, which no dataset may."""

    def __init__(self, ask: Callable[[], object]) -> None:
        self.ask = ask

    def __len__(self) -> int:
        return 2

    def __getitem__(self, item: int) -> Tensor:
        self.ask()
        return torch.zeros(1)


@pytest.mark.parametrize("what", ["replicated", "sharded", "build"])
def test_a_dataloader_worker_that_asks_is_refused(what: str) -> None:
    keys = unit(20, 4, 0)
    index = build_index(keys) if what != "sharded" else ShardedIndex(keys, "cpu")
    ask = (lambda: build_index(keys)) if what == "build" else (lambda: index.search(keys[:1], 1))
    loader = torch.utils.data.DataLoader(Asking(ask), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match=r"DataLoader worker 0 of 1 searched the X-ray index.*training process"):
        list(loader)
    ask()  # here it may


def test_many_equal_keys_are_taken_in_order_of_position() -> None:
    """More ties than FAISS is asked for candidates, before and behind nearer keys."""
    keys = unit(6000, 8, 0)
    keys[100:5000] = unit(1, 8, 9)[0]
    query = F.normalize(unit(1, 8, 9) + 0.3 * unit(1, 8, 3), dim=-1)
    similarity, position = build_index(keys).search(query, 3000)
    scores = (query.double().numpy() @ keys.double().numpy().T).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :3000]
    assert np.array_equal(position, order)
    assert np.array_equal(similarity, np.take_along_axis(scores, order, 1))


def test_a_query_gets_the_same_bits_in_any_company() -> None:
    keys, queries = unit(3000, 96, 0), unit(40, 96, 1)
    index = build_index(keys)
    together = index.search(queries, 5)
    alone = [index.search(query[None], 5) for query in queries]
    assert torch.equal(together[0], torch.cat([similarity for similarity, _ in alone]))
    assert torch.equal(together[1], torch.cat([position for _, position in alone]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["exact", "ivf", "sharded"])
def test_the_gpu_gives_the_results_of_the_cpu(kind: str) -> None:
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        pytest.skip("FAISS sees no GPU here; install ctx-distill[gpu] on a machine with one")
    keys, queries = unit(20_000, 64, 0), unit(40, 64, 1)
    if kind == "sharded":
        mine, theirs = ShardedIndex(keys, "gpu"), ShardedIndex(keys, "cpu")
        found, expected = mine.search(queries.cuda(), 8), theirs.search(queries, 8)
        assert mine._on_gpu is not None
    else:
        built = build_index(keys, kind, device="cpu")  # type: ignore[arg-type]
        gpu = XrayIndex(built._cpu, built.kind, "gpu", equal=built.equal)
        assert gpu.on_gpu
        found, expected = gpu.search(queries.cuda(), 8), built.search(queries, 8)
    assert found[0].is_cuda
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=0 if kind != "ivf" else 1e-5)
    assert (found[1].cpu() == expected[1]).float().mean() > (0.999 if kind == "ivf" else 0.99999)


def test_a_recall_below_the_set_one_is_told_beside_exact_search() -> None:
    keys, probes = unit(3000, 64, 0), unit(100, 64, 1)
    index = build_index(keys, "ivf", search_width=2, probes=probes)
    best = brute(keys, probes, 1)[0][:, 0]
    share = float((index.search(probes, 1)[0][:, 0].numpy() >= best - 1e-5).mean())
    assert 0.05 < share < 0.95
    assert index.recall == pytest.approx(share)
    build_index(keys, "ivf", search_width=2, probes=probes, minimum_recall=share - 0.01)
    with pytest.raises(InputError, match="expected at least"):
        build_index(keys, "ivf", search_width=2, probes=probes, minimum_recall=share + 0.01)


FORK = """
import torch
from torch.utils.data import DataLoader
from ctx_distill.retrieval.build_index import build_index
from ctx_distill.retrieval.index import faiss_module

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return (torch.full((64, 64), float(i)) @ torch.ones(64, 64)).sum()

if __name__ == "__main__":
    torch.set_num_threads(2)
    keys = torch.nn.functional.normalize(torch.randn(20000, 32), dim=-1)
    index = build_index(keys)
    faiss_module().omp_set_num_threads(2)
    for batch in (1, 64):
        assert index.search(keys[:batch], 3)[1][:, 0].tolist() == list(range(batch))
    for _ in range(2):
        loader = DataLoader(Items(), 2, num_workers=2, multiprocessing_context="fork")
        total = sum(batch.sum().item() for batch in loader)
        index.search(keys[:64], 3)
    print("read", total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork of DataLoader workers is Linux's default alone")
def test_a_search_then_forked_dataloader_workers(tmp_path: Path) -> None:
    """faiss before torch, a parallel search and a fork hang every time; this order must not."""
    script = tmp_path / "fork.py"
    script.write_text(FORK)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("read ")

"""The order of an epoch: shuffles, ranks that share it out, shares of sources and classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctx_distill.data.loading import order
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.loading.order import EpochBatches, EpochShuffle, InOrder, Mixing
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.distributed import gather_with_gradient, own_first_rows, world_size
from ctx_distill.errors import InputError

SPEC = VolumeSpec(spacing=(12.0, 12.0, 12.0), shape=(8, 8, 8))


def test_one_process_sees_the_order_it_has_always_seen() -> None:
    """The committed ablation rests on this order: torch's own permutation of seed and epoch."""
    sampler = EpochShuffle(50, 3)
    for epoch in (0, 1, 7):
        sampler.set_epoch(epoch)
        expected = torch.randperm(50, generator=torch.Generator().manual_seed(3 * 100_003 + epoch)).tolist()
        assert list(sampler) == expected
    assert len(sampler) == 50


def shares(size: int) -> list[list[int]]:
    """This rank's indices of three epochs, out of a DataLoader as Lightning leaves it."""
    import lightning as L
    from torch.utils.data import DataLoader

    sampler = EpochShuffle(size, 1)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    loader = trainer._data_connector._prepare_dataloader(DataLoader(range(size), sampler=sampler), False, "train")  # type: ignore[arg-type]
    assert loader.sampler is sampler
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len(sampler) == size // world_size()
        epochs.append(list(sampler))
    return epochs


@pytest.mark.ddp
@pytest.mark.parametrize("size", [12, 13])
def test_ranks_never_read_a_scan_twice_an_epoch(pool: Callable[[int], Any], size: int) -> None:
    parts = pool(2).run(__file__, "shares", {"size": size})
    for epoch in range(3):
        both = parts[0][epoch] + parts[1][epoch]
        assert len(parts[0][epoch]) == len(parts[1][epoch]) == size // 2
        assert len(set(both)) == len(both)
        whole = torch.randperm(size, generator=torch.Generator().manual_seed(100_003 + epoch)).tolist()
        assert [whole[2 * i] for i in range(size // 2)] == parts[0][epoch]
    if size % 2:
        left_out = {tuple(sorted(set(range(size)) - set(parts[0][e] + parts[1][e]))) for e in range(3)}
        assert len(left_out) > 1  # not the same scan every time


class Ranks:
    """`EpochBatches` of each rank of a world, without processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: int, size: int, batch: int) -> None:
        self.patch, self.ranks = monkeypatch, ranks
        monkeypatch.setattr(order, "world_size", lambda: ranks)
        self.batches = EpochBatches(EpochShuffle(size, 3), batch)

    def read(self) -> list[list[list[int]]]:
        """Per global batch, the items of each rank."""
        each = []
        for rank in range(self.ranks):
            self.patch.setattr(order, "rank", lambda rank=rank: rank)
            each.append(list(self.batches))
        return [list(parts) for parts in zip(*each, strict=True)]


@pytest.mark.parametrize(("size", "batch", "ranks"), [(50, 4, 1), (50, 4, 2), (50, 4, 3), (3, 4, 1), (5, 4, 2)])
def test_batches_are_the_order_cut_up_as_a_data_loader_would(
    monkeypatch: pytest.MonkeyPatch, size: int, batch: int, ranks: int
) -> None:
    world = Ranks(monkeypatch, ranks, size, batch)
    found = world.read()
    for rank in range(ranks):
        monkeypatch.setattr(order, "rank", lambda rank=rank: rank)
        own = list(EpochShuffle(size, 3))
        expected = list(torch.utils.data.BatchSampler(own, batch, drop_last=len(own) >= batch))
        assert [parts[rank] for parts in found] == expected
    assert len(world.batches) == len(found)


def test_what_is_left_of_an_epoch_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Ranks(monkeypatch, 1, 50, 4)
    world.batches.set_epoch(2)
    whole = world.read()
    world.batches.resume(world.batches.part(2).after(5))
    assert world.read() == whole[5:]
    world.batches.set_epoch(3)
    assert len(world.read()) == 12


@pytest.mark.parametrize(
    ("before", "after", "size", "done", "sizes"),
    [
        (1, 2, 24, 6, [[2, 2]] * 3),  # 12 rows
        (1, 2, 26, 8, [[2, 2], [2, 1], [2, 1]]),  # 10 rows: 4, 3 and 3
        (2, 1, 24, 2, [[2]] * 8),
        (2, 4, 27, 3, [[2, 2, 1, 1], [2, 2, 1, 1]]),
        (4, 2, 27, 1, [[2, 2]] * 4),
        (1, 4, 24, 11, [[1, 1, 1, 1]]),  # two rows for four ranks: the last of them fills up
        (1, 4, 31, 1, [[3, 3, 2, 2], [3, 2, 2, 2], [3, 2, 2, 2]]),  # 28 rows, and an epoch of three batches of 8
        (1, 2, 24, 0, [[2, 2]] * 6),  # at an epoch's border
    ],
)
def test_what_is_left_is_spread_over_another_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, before: int, after: int, size: int, done: int, sizes: list[list[int]]
) -> None:
    old = Ranks(monkeypatch, before, size, 2)
    old.batches.set_epoch(1)
    whole = old.read()
    part = old.batches.part(1).after(done)
    new = Ranks(monkeypatch, after, size, 2)
    new.batches.resume(part)
    found = new.read()
    rest = [item for parts in whole[done:] for own in parts for item in own]
    read = [item for parts in found for own in parts for item in own]
    assert set(read) == set(rest)
    assert len(read) == len(rest) or len(rest) < after
    assert [[len(own) for own in parts] for parts in found] == sizes
    # stopped once more, on as many ranks: what was planned goes on
    new.batches.resume(new.batches.part(1).after(1))
    assert new.read() == found[1:]
    new.batches.set_epoch(2)
    assert len(new.read()) == len(new.batches)


def held_out(size: int, batch: int) -> dict[str, Any]:
    """This rank's batches of held-out items, and the items of all ranks of which it says that they come first."""
    items = list(InOrder(size))
    batches = [torch.tensor(items[start : start + batch]) for start in range(0, len(items), batch)]
    counted = [gather_with_gradient(rows[own_first_rows(rows)]).tolist() for rows in batches]
    return {"items": items, "counted": counted}


@pytest.mark.ddp
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_held_out_items_come_in_order_and_count_once(pool: Callable[[int], Any], ranks: int) -> None:
    for size in (1, 5, 8, 13):
        parts = pool(ranks).run(__file__, "held_out", {"size": size, "batch": 2})
        assert len({len(part["items"]) for part in parts}) == 1
        for rank, part in enumerate(parts):
            own = list(range(rank, size, ranks))
            assert part["items"][: len(own)] == own
            assert part["items"][len(own) :] in ([], [size - 1])  # the last one fills up
            assert sorted(item for batch in part["counted"] for item in batch) == list(range(size))


def table(folder: Path) -> Path:
    """90 rows of a, 30 of b, 10 of c; every third has the finding."""
    rows = ["study_id,patient_id,split,image_path,findings,impression,source,label:effusion,label:mass"]
    for n in range(130):
        source = "a" if n < 90 else "b" if n < 120 else "c"
        rows.append(f"s{n},p{n},train,x.nii.gz,Text.,,{source},{int(n % 3 == 0)},{'' if n % 7 else 1}")
    (folder / "ct.csv").write_text("\n".join(rows) + "\n")
    (folder / "x.nii.gz").write_bytes(b"\x1f\x8b")
    return folder / "ct.csv"


def test_shares_of_sources_hold_in_every_epoch_without_repeats(tmp_path: Path) -> None:
    module = CTDataModule(str(table(tmp_path)), SPEC, mixing=Mixing("source", {"a": 0.5, "b": 0.4, "c": 0.1}))
    sampler = module.order(module.manifest)
    source = module.manifest.frame["source"].to_numpy()
    assert len(sampler) == 74  # b is the scarcest: 30 / .4 = 75, of which 37.5, 30 and 7.5 are cut to whole scans
    seen: set[int] = set()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(set(order)) == len(order) == 74
        assert Counter(source[order]) == {"a": 37, "b": 30, "c": 7}
        seen |= set(order)
        sampler.set_epoch(epoch)
        assert list(sampler) == order
    assert len(seen) > 74
    # mixed through and through, not one source after the other
    sampler.set_epoch(0)
    halves = np.array_split(source[list(sampler)], 2)
    assert all(8 <= Counter(half)["b"] <= 22 for half in halves)


def test_shares_of_classes_for_tasks_that_see_labels(tmp_path: Path) -> None:
    path = table(tmp_path)
    manifest = read_manifest(path)
    for by, positive in (
        ("label:effusion", manifest.labels()[:, 0] == 1),
        ("label:any", (manifest.labels() == 1).any(axis=1)),
    ):
        module = CTDataModule(str(path), SPEC, with_labels=True, mixing=Mixing(by, {"1": 0.5, "0": 0.5}))
        order = list(module.order(module.manifest))
        assert positive[order].mean() == 0.5
        assert len(order) == 2 * min(positive.sum(), (~positive).sum())
    blind = CTDataModule(str(path), SPEC, mixing=Mixing("label:effusion", {"1": 0.5, "0": 0.5}))
    with pytest.raises(InputError, match="this stage must not see labels"):
        blind.order(blind.manifest)


@pytest.mark.parametrize(
    ("mixing", "word"),
    [
        (Mixing("source", {"a": 0.5}), "sum to 1"),
        (Mixing("source", {"a": 1.5, "b": -0.5}), "sum to 1"),
        (Mixing("source", {}), "sum to 1"),
        (
            Mixing("source", {"a": 0.5, "z": 0.5}),
            "no training row has source 'z', which mixing.shares names; choose from: a, b, c",
        ),
        (Mixing("scanner", {"a": 1.0}), "expected source, label:any or label:<finding>"),
    ],
)
def test_mixings_that_cannot_be(tmp_path: Path, mixing: Mixing, word: str) -> None:
    module = CTDataModule(str(table(tmp_path)), SPEC, mixing=mixing)
    with pytest.raises(InputError, match=word):
        module.order(module.manifest)

"""The order of an epoch: shuffles, ranks that share it out, shares of sources and classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctx_distill.data.datamodules import CTDataModule
from ctx_distill.data.manifest import read_manifest
from ctx_distill.data.order import EpochShuffle, InOrder, Mixing
from ctx_distill.data.transforms import VolumeSpec
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


def test_what_is_left_of_an_epoch_is_read_once() -> None:
    sampler = EpochShuffle(50, 3)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.go_on(2, 20)
    assert list(sampler) == whole[20:]
    sampler.set_epoch(3)
    assert len(list(sampler)) == 50


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
        (Mixing("source", {"a": 0.5}), "add up to 1"),
        (Mixing("source", {"a": 1.5, "b": -0.5}), "add up to 1"),
        (Mixing("source", {}), "add up to 1"),
        (Mixing("source", {"a": 0.5, "z": 0.5}), "names 'z', and no training row has it; found a, b, c"),
        (Mixing("scanner", {"a": 1.0}), "expected source, label:any or label:<finding>"),
    ],
)
def test_mixings_that_cannot_be(tmp_path: Path, mixing: Mixing, word: str) -> None:
    module = CTDataModule(str(table(tmp_path)), SPEC, mixing=mixing)
    with pytest.raises(InputError, match=word):
        module.order(module.manifest)

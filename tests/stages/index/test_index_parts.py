"""Embedding the pool in parts: a run that was stopped goes on, and ends with the index of one that never stopped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ctx_distill.commands.main import main
from ctx_distill.data.loading.datamodules import XrayDataModule
from ctx_distill.errors import InputError
from ctx_distill.retrieval.shards import merge_shards
from ctx_distill.stages.index.task import IndexTask
from ctx_distill.types import XrayBatch

pytestmark = pytest.mark.full
ARTEFACT = ("model.safetensors", "index.faiss", "items.csv", "artefact.json")


class Killed(Exception):
    """Stands for a kill in the middle of a batch."""


def count_rows(monkeypatch: pytest.MonkeyPatch, end_after: int | None = None) -> list[int]:
    """The rows that are embedded from here on; the run dies in the batch after so many."""
    seen: list[int] = []
    step = IndexTask.predict_step

    @functools.wraps(step)
    def watched(self: IndexTask, batch: XrayBatch, batch_idx: int) -> dict[str, Tensor]:
        if end_after is not None and len(seen) >= end_after:
            raise Killed
        seen.extend(batch.row.tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(IndexTask, "predict_step", watched)
    return seen


def test_a_run_that_was_killed_embeds_what_is_missing_and_ends_the_same(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = finished_run / "expert" / "artefact"

    def index(run: str) -> Path:
        given = ["index", "--data", str(cohort), "--run", str(tmp_path / run), "--preset", str(tiny_preset)]
        assert main([*given, "--expert", str(expert), "--model.init_args.part_items=7"]) == 0
        return tmp_path / run / "index"

    with monkeypatch.context() as patch:
        whole = count_rows(patch)
        undisturbed = index("undisturbed")
    assert not (undisturbed / "shards").exists()
    assert len(whole) > 14

    with monkeypatch.context() as patch:
        before = count_rows(patch, end_after=14)
        with pytest.raises(Killed):
            index("killed")
    shards = tmp_path / "killed" / "index" / "shards"
    assert len(list(shards.glob("shard-*.safetensors"))) == 2
    (shards / ".shard-000002-00000.safetensors.1.part").write_bytes(b"half")

    with monkeypatch.context() as patch:
        after = count_rows(patch)
        resumed = index("killed")
    assert before + after == whole
    for name in ARTEFACT:
        assert (resumed / "artefact" / name).read_bytes() == (undisturbed / "artefact" / name).read_bytes()
    assert (resumed / "metrics.json").read_bytes() == (undisturbed / "metrics.json").read_bytes()


def ranks_embed(expert: str, xray: str, shards: str) -> dict[str, Any]:
    """Embed on this rank: once killed in the second block, then to the end, then once in another folder undisturbed."""
    task, module = IndexTask(expert, part_items=5), XrayDataModule(xray, eval_batch_size=4)
    module.preprocess, module.preprocess_key = task.expert.preprocess, "test"
    pool = module.manifest.split("train")
    pool = pool.where([place < 23 for place in range(len(pool))])
    seen: list[int] = []
    alive = [8]

    def predict(task: IndexTask, dataloaders: Any) -> list[dict[str, Tensor]]:
        found = []
        for batch in dataloaders:
            if len(seen) >= alive[0]:
                raise Killed
            seen.extend(batch.row.tolist())
            found.append(task.predict_step(batch, 0))
        return found

    trainer: Any = SimpleNamespace(predict=predict, precision="32-true")
    torch.manual_seed(0)
    try:
        task._embed(trainer, module, pool, Path(shards))
        killed = False
    except Killed:
        killed = True
    before, alive[0] = len(seen), 1000
    task._embed(trainer, module, pool, Path(shards))
    resumed = len(seen) - before
    task._embed(trainer, module, pool, Path(shards + "-undisturbed"))
    rows = [int(row) for row in pool.frame.index]
    return {
        "killed": killed,
        "counts": [before, resumed, len(seen) - before - resumed],
        "resumed": merge_shards(Path(shards), rows),
        "undisturbed": merge_shards(Path(shards + "-undisturbed"), rows),
    }


@pytest.mark.ddp
def test_two_ranks_go_on_from_their_parts(
    finished_run: Path, cohort: Path, tmp_path: Path, pool: Callable[[int], Any]
) -> None:
    arguments = {
        "expert": str(finished_run / "expert/artefact"),
        "xray": str(cohort / "xray.csv"),
        "shards": str(tmp_path / "s"),
    }
    for found in pool(2).run(__file__, "ranks_embed", arguments):
        assert found["killed"]
        # 23 rows in blocks of 2 x 5: of the last block's three rows rank 1 repeats one, which no shard takes in
        assert found["counts"] == [9, 7, 12]
        assert len(found["resumed"]["row"]) == 23
        for name in ("keys", "values", "row"):
            assert torch.equal(found["resumed"][name], found["undisturbed"][name])


def test_parts_of_nothing_are_refused(finished_run: Path) -> None:
    with pytest.raises(InputError, match="part_items is 0"):
        IndexTask(str(finished_run / "expert/artefact"), part_items=0)

"""The X-ray index is opened on the GPU of the rank, in `setup`, and only where the task looks something up.

There is no GPU here: FAISS is given four that only note what is put on them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.errors import InputError
from ctx_distill.models.ct_encoder import ResNet3D
from ctx_distill.retrieval import index as index_module
from ctx_distill.retrieval.build_index import build_index
from ctx_distill.retrieval.index import XrayIndex, faiss_module, gpu_of
from ctx_distill.retrieval.sharded import ShardedIndex
from ctx_distill.stages.align.distillation_regulariser import DistillationRegulariserSettings
from ctx_distill.stages.align.evidence import RobustSettings
from ctx_distill.stages.align.task import AlignmentTask
from ctx_distill.stages.distill.targets import NeighbourSettings, TeacherSettings
from ctx_distill.stages.distill.task import DistillationTask

pytestmark = pytest.mark.full
SPEC = VolumeSpec(spacing=(24.0, 24.0, 24.0), shape=(12, 16, 16))
DEVICE = torch.device("cuda", 3)


class Gpus:
    """faiss with four GPUs.

    Attributes:
        used: the numbers of the GPUs that an index was put on, in turn.
    """

    def __init__(self) -> None:
        self.faiss, self.used = faiss_module(), list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.faiss, name)

    def get_num_gpus(self) -> int:
        return 4

    class StandardGpuResources:
        pass

    class GpuIndexFlatConfig:
        device = 0

    def index_cpu_to_gpu(self, resources: Any, gpu: int, index: Any) -> Any:
        assert isinstance(resources, self.StandardGpuResources)
        self.used.append(gpu)
        return self.faiss.clone_index(index)

    def GpuIndexFlatIP(self, resources: Any, dimension: int, config: Any) -> Any:
        assert isinstance(resources, self.StandardGpuResources)
        self.used.append(config.device)
        return self.faiss.IndexFlatIP(dimension)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    fake = Gpus()
    monkeypatch.setattr(index_module, "_import_faiss", lambda: fake)
    return fake


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The index files that are read from here on."""
    found: list[Path] = []
    load = XrayIndex.load.__func__  # type: ignore[attr-defined]

    def noted(cls: type[XrayIndex], path: Path, device: Any = "auto") -> XrayIndex:
        found.append(path)
        return load(cls, path, device)  # type: ignore[no-any-return]

    monkeypatch.setattr(XrayIndex, "load", classmethod(noted))
    return found


def set_up(task: Any, cohort: Path, **data: Any) -> None:
    """`setup("fit")` as the trainer of rank 3 calls it; frozen towers stay on the CPU."""
    for name in ("_teacher", "_queries"):
        if isinstance(getattr(task, name), tuple):
            kept = getattr(task, name)[0]
            setattr(task, name, (SimpleNamespace(to=lambda device, kept=kept: kept),))
    module = CTDataModule(str(cohort / "ct.csv"), SPEC, **data)
    task._trainer = SimpleNamespace(
        default_root_dir=str(cohort), strategy=SimpleNamespace(root_device=DEVICE), datamodule=module
    )
    task.setup("fit")


def distillation(run: Path, **settings: Any) -> DistillationTask:
    return DistillationTask(
        ResNet3D(variant="small"), str(run / "expert/artefact"), str(run / "index/artefact"), vocabulary="phantom",
        **settings,
    )  # fmt: skip


def alignment(run: Path, robust: RobustSettings, **settings: Any) -> AlignmentTask:
    return AlignmentTask(
        str(run / "expert/artefact"), str(run / "index/artefact"), encoder=ResNet3D(variant="small"), robust=robust,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("device", ["auto", "gpu"])
def test_distillation_places_the_index_on_the_gpu_of_its_rank(
    finished_run: Path, cohort: Path, gpus: Gpus, device: Any
) -> None:
    task = distillation(finished_run, neighbours=NeighbourSettings(device=device))
    assert gpus.used == []
    set_up(task, cohort)
    assert gpus.used == [3]
    expected = XrayIndex.load(finished_run / "index/artefact/index.faiss", "cpu")
    queries = torch.nn.functional.normalize(torch.randn(4, expected.dimension), dim=-1)
    for mine, theirs in zip(task.store.index.search(queries, 5), expected.search(queries, 5), strict=True):
        assert torch.equal(mine, theirs)
    assert gpus.used == [3]


def test_a_part_of_a_sharded_index_goes_to_the_gpu_of_its_rank(finished_run: Path, cohort: Path, gpus: Gpus) -> None:
    task = distillation(finished_run, neighbours=NeighbourSettings(placement="sharded"))
    assert isinstance(task.store.index, ShardedIndex)
    set_up(task, cohort)
    task.store.index.search(torch.ones(1, task.store.key_dim), 1)
    assert gpus.used == [3]


def test_what_stays_on_the_cpu(finished_run: Path, cohort: Path, gpus: Gpus) -> None:
    task = distillation(finished_run, neighbours=NeighbourSettings(device="cpu"))
    set_up(task, cohort)
    hnsw = build_index(torch.nn.functional.normalize(torch.randn(50, 8), dim=-1), "hnsw")
    hnsw.place(DEVICE)
    assert not hnsw.on_gpu
    assert gpus.used == []
    assert gpu_of("auto", torch.device("cpu")) is None, "a rank that trains on the CPU takes no GPU"
    assert gpu_of("gpu", torch.device("cpu")) == 0, "`gpu` is given"


def test_without_a_task_the_process_s_own_gpu_is_taken(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_index(torch.nn.functional.normalize(torch.randn(50, 8), dim=-1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    index.search(torch.ones(1, 8), 1)
    assert gpus.used == [2]


def test_alignment_opens_no_index_that_its_evidence_does_not_use(
    finished_run: Path, cohort: Path, gpus: Gpus, opened: list[Path]
) -> None:
    for evidence in (("findings",), ("report",), ("ema",), ()):
        task = alignment(finished_run, RobustSettings(evidence=evidence, vocabulary="phantom"))  # type: ignore[arg-type]
        task.moving_average = SimpleNamespace(threshold=torch.tensor(0.5))  # type: ignore[assignment]
        set_up(task, cohort)
        assert (opened, gpus.used) == ([], []), evidence
        assert (task.false_negatives is not None) == bool(evidence)


@pytest.mark.parametrize("asks", ["retrieved", "keep"])
def test_alignment_places_the_index_that_it_uses_on_the_gpu_of_its_rank(
    finished_run: Path, cohort: Path, gpus: Gpus, opened: list[Path], asks: str
) -> None:
    evidence = ("retrieved", "findings") if asks == "retrieved" else ("findings",)
    keep = DistillationRegulariserSettings(weight=0.5 if asks == "keep" else 0.0)
    task = alignment(finished_run, RobustSettings(evidence=evidence, vocabulary="phantom"), keep=keep)  # type: ignore[arg-type]
    task.model = SimpleNamespace(embed_dim=task.lookup.store.value_dim)  # type: ignore[assignment]
    assert len(opened) == 1, "it is read, and refused where it is damaged, when the task is made"
    assert gpus.used == []
    set_up(task, cohort)
    assert gpus.used == [3]


def test_distillation_without_lookups_opens_no_index(
    finished_run: Path, cohort: Path, gpus: Gpus, opened: list[Path]
) -> None:
    task = distillation(finished_run, teachers=TeacherSettings(retrieved=0.0, projection=1.0))
    set_up(task, cohort, projection=True)
    oracle = NeighbourSettings(control="oracle", oracle_manifest=str(cohort / "xray.csv"))
    set_up(distillation(finished_run, neighbours=oracle), cohort, with_labels=True)
    assert (opened, gpus.used) == ([], [])


def test_refusals_still_come_when_the_task_is_made(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "index/artefact", tmp_path / "index/artefact")
    (tmp_path / "expert").symlink_to(finished_run / "expert")
    (tmp_path / "index/artefact/index.faiss").write_bytes(b"damaged")
    with pytest.raises(InputError, match="not a readable FAISS index"):
        distillation(tmp_path)
    with pytest.raises(InputError, match="not a readable FAISS index"):
        alignment(tmp_path, RobustSettings(evidence=("retrieved",), vocabulary="phantom"))
    if not torch.cuda.is_available():
        for placement in ("replicated", "sharded"):
            with pytest.raises(InputError, match="FAISS has no GPU"):
                distillation(finished_run, neighbours=NeighbourSettings(device="gpu", placement=placement))  # type: ignore[arg-type]

"""Rows of `make bench-train`: the project's stages under their trainer, plain loops, and the ceilings of the device."""

from __future__ import annotations

import ctypes
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from train_flops import encoder_of, step_flops

SEED = 0
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Job:
    """A row.

    Attributes:
        kind: distill or align: the stage; plain: the loop beside it; cached: steps of `batch` volumes from the host;
            ceilings: matrix products, copies and attention at the size of this encoder.
        encoder: see `train_flops.encoder_of`.
        shape: (D, H, W).
        patch: of a ViT.
        batch: volumes of a step.
        precision: 32-true or bf16-mixed.
        compile: torch.compile; convolutions channels last with it.
        checkpointing: of activations.
        micro_batch: of cached gradients.
        warmup: steps that are not counted.
        steps: that are.
        workers: that read ahead.
        data: folder of what `train_data` made.
        manifest: whose rows are trained on; its reports are those of the plain loop.
        epoch_steps: steps of an epoch. The first step of an epoch does not count: it waits for the readers to start again,
            once in 8 steps here and once in some hundred in a real run.
    """

    kind: str
    encoder: str
    shape: tuple[int, int, int]
    patch: int
    batch: int
    precision: str
    data: str
    manifest: str
    compile: bool = False
    checkpointing: bool = False
    micro_batch: int | None = None
    warmup: int = 1
    steps: int = 1
    workers: int = 0
    epoch_steps: int | None = None

    def counted(self) -> list[int]:
        """The numbers of the steps that count, from 0."""
        numbers = list(range(self.warmup, self.warmup + self.steps))
        return [n for n in numbers if self.epoch_steps is None or n % self.epoch_steps] or numbers

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """The job of `to_json`."""
        return cls(**{**values, "shape": tuple(values["shape"])})


class Memory:
    """Peak over what the process had: of torch's allocations on a GPU, else of the resident set. Gigabytes (10^9)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0.0 if device.type == "cuda" else _resident("VmRSS")
        self.restart()

    def restart(self) -> None:
        """Look for the peak from here on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """Since the last restart."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return _resident("VmHWM") - self.before


def _resident(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e9


def device_here() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now(device: torch.device) -> float:
    """Seconds: by the clock, once the GPU has done what it was given; without one, of this process's CPU time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()  # other work on the machine does not show in it


def matmul_peak(precision: str, device: torch.device) -> float:
    """Operations per second of the fastest of some square matrix products, in the type that the step multiplies in."""
    size, dtype = (8192 if device.type == "cuda" else 2048), torch.bfloat16 if "bf16" in precision else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / best_of(10 if device.type == "cuda" else 3, lambda: a @ b, device)


def measure(job: Job) -> dict[str, Any]:
    """Volumes per second, shares of the step, memory, and utilisation of the measured matrix peak.

    What a row left on the GPU is freed first, so that several rows may share a process.
    """
    _load_libraries()
    gc.collect()
    torch.manual_seed(SEED)
    device = device_here()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch._dynamo.config.recompile_limit = 32  # a process holds several rows; training holds one encoder
    if job.kind == "ceilings":
        return ceilings(job, device)
    memory = Memory(device)
    rows = {"distill": stage_row, "align": stage_row, "plain": plain_row, "cached": cached_row}
    began = time.perf_counter()
    result = rows[job.kind](job, device, memory)
    seconds = time.perf_counter() - began
    with torch.device("meta"):
        counted = encoder_of(job.encoder, job.shape, job.patch)
    forward, whole = step_flops(counted, job.shape)
    peak = matmul_peak(job.precision, device)
    rate = job.batch / result["step_s"]
    return {**result, "row_s": seconds, "volumes_s": rate, "flops_forward": forward, "flops": whole,
            "matmul_flops_s": peak, "utilisation": rate * whole / peak}  # fmt: skip


def ceilings(job: Job, device: torch.device) -> dict[str, Any]:
    """What the device can do at best: products in both types, copies, and attention at the size of this encoder.

    Attention is timed forward and backward with each of torch's kernels and with the one that torch chooses.
    """
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    result: dict[str, Any] = {
        f"matmul_{name}_flops_s": matmul_peak(precision, device)
        for name, precision in (("bf16", "bf16-mixed"), ("fp32", "32-true"))
    }
    result |= copies(device)
    tokens = job.shape[0] * job.shape[1] * job.shape[2] // job.patch**3
    heads, width = 12, 64
    query, key, value = (
        torch.randn(job.batch, heads, tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    flops = 3.5 * 4 * job.batch * heads * tokens**2 * width  # two products forward, five backward

    def attend() -> None:
        F.scaled_dot_product_attention(query, key, value).sum().backward()

    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
               "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
    for name, kernel in kernels.items():
        if device.type != "cuda":
            continue
        try:
            with sdpa_kernel(kernel):
                result[f"attention_{name}_flops_s"] = flops / best_of(3, attend, device)
        except RuntimeError as error:
            result[f"attention_{name}_refused"] = str(error).splitlines()[0][:200]
    result["attention_chosen_flops_s"] = flops / best_of(3, attend, device)
    return result


def copies(device: torch.device) -> dict[str, float]:
    """Bytes per second within the device, read and written, and from the host's pinned memory to it."""
    count = 2**30 if device.type == "cuda" else 2**24
    host = torch.zeros(count // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    first, second = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    return {
        "copy_bytes_s": 2 * count / best_of(5, lambda: second.copy_(first), device),
        "host_to_device_bytes_s": len(host) / best_of(5, lambda: second[: len(host)].copy_(host), device),
    }


def best_of(times: int, work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    spent = []
    for _ in range(1 + times):
        began = now(device)
        work()
        spent.append(now(device) - began)
    return min(spent[1:])


def _load_libraries() -> None:
    """What every row imports, so that it counts in none's memory."""
    import monai.networks.nets
    import open_clip.loss
    import transformers

    import ctx_distill.stages.align.task
    import ctx_distill.stages.distill.task  # noqa: F401

    del monai, open_clip, transformers


def stage_row(job: Job, device: torch.device, memory: Memory) -> dict[str, Any]:
    """The stage's own task, data module and trainer, from the prepared volumes."""
    import lightning as L
    from train_data import volume_spec

    from ctx_distill.data.loading.datamodules import CTDataModule
    from ctx_distill.data.transforms.augment import Augmentation
    from ctx_distill.models.compute import ComputeSettings
    from ctx_distill.stages.align.report_tower import TextSettings
    from ctx_distill.stages.align.task import AlignmentTask
    from ctx_distill.stages.distill.task import DistillationTask

    data = Path(job.data)
    common: dict[str, Any] = {
        "expert": str(data / "expert"), "index": str(data / "index"),
        "augmentation": Augmentation(shift=0.05, scale=0.05, contrast=0.05, brightness=0.05, noise=0.01),
        "compute": ComputeSettings(checkpointing=job.checkpointing, compile=job.compile),
    }  # fmt: skip
    encoder = encoder_of(job.encoder, job.shape, job.patch)
    task: Any
    if job.kind == "distill":
        task = DistillationTask(encoder, anchors="prompts", vocabulary="phantom", **common)
    else:
        text = TextSettings(tower="expert", trainable=False)
        task = AlignmentTask(encoder=encoder, text=text, micro_batch=job.micro_batch, **common)
    task.finish = lambda *_: {}
    waits: list[float] = []
    steps: list[float] = []
    lookups: list[tuple[float, float]] = []

    class Clock(L.Callback):
        last = 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            waits.append(now(device) - self.last)

        def on_train_batch_end(self, *_: Any) -> None:
            end = now(device)
            steps.append(end - self.last)
            self.last = end
            if len(steps) == job.warmup:
                memory.restart()

        def on_train_epoch_start(self, *_: Any) -> None:
            self.last = now(device)

    if job.kind == "distill":
        ends = task.lookup_clock.end_step
        task.lookup_clock.end_step = lambda: [lookups.append(x := ends()), x][1]
    module = CTDataModule(
        job.manifest, volume_spec(job.shape), batch_size=job.batch, num_workers=job.workers,
        cache_gb=0.0, text="required", prepared=str(data / "prepared" / "x".join(map(str, job.shape))),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=device.type if device.type == "cpu" else "gpu", devices=1, precision=job.precision, max_steps=job.warmup + job.steps, max_epochs=-1,
            logger=False, default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, limit_val_batches=0,
        )  # type: ignore[arg-type] # fmt: skip
        trainer.callbacks.append(Clock())
        task.run(trainer, module, Path(folder))
    seconds, waited = [steps[n] for n in job.counted()], [waits[n] for n in job.counted()]
    looked = [lookups[n][1] for n in job.counted()] if lookups else []
    return {"step_s": median(seconds), "wait_share": sum(waited) / sum(seconds),
            "lookup_share": sum(looked) / max(1, len(looked)), "gather_share": 0.0, "memory_gb": memory.peak()}  # fmt: skip


def dual_encoder(job: Job, device: torch.device) -> tuple[Any, list[str]]:
    """The model of stage 3 with the expert's text tower, frozen, and the reports."""
    from ctx_distill.data.manifests.manifest import read_manifest
    from ctx_distill.models.compute import ComputeSettings
    from ctx_distill.models.dual_encoder import DualEncoder
    from ctx_distill.models.text_encoder import ExpertTextEncoder

    data = Path(job.data)
    encoder = encoder_of(job.encoder, job.shape, job.patch)
    model = DualEncoder(encoder, ExpertTextEncoder.from_expert(str(data / "expert"))).to(device).train()
    encoder.compute_with(ComputeSettings(checkpointing=job.checkpointing, compile=job.compile), device)
    manifest = read_manifest(Path(job.manifest), check_images=False)
    reports = [manifest.report(row) for row in manifest.frame.index]
    return model, [reports[place % len(reports)] for place in range(job.batch)]


def timed(job: Job, device: torch.device, step: Callable[[], None], memory: Memory) -> dict[str, Any]:
    """Seconds and memory of a step that is fed from memory."""
    seconds = []
    for number in range(job.warmup + job.steps):
        if number == job.warmup:
            memory.restart()
        began = now(device)
        step()
        seconds.append(now(device) - began)
    return {"step_s": median(seconds[job.warmup :]), "wait_share": 0.0, "lookup_share": 0.0, "gather_share": 0.0,
            "memory_gb": memory.peak()}  # fmt: skip


def plain_row(job: Job, device: torch.device, memory: Memory) -> dict[str, Any]:
    """The same model in a loop as short as it can be written: open_clip's ClipLoss, AdamW, volumes on the device."""
    from open_clip.loss import ClipLoss

    model, reports = dual_encoder(job, device)
    loss_of = ClipLoss()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=device.type == "cuda" or None)
    volumes = torch.rand(job.batch, 1, *job.shape, device=device) * 2 - 1

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in job.precision):
            image, _ = model.encode_alone(volumes)
            loss = loss_of(image, model.encode_text(reports), model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return timed(job, device, step, memory)


def cached_row(job: Job, device: torch.device, memory: Memory) -> dict[str, Any]:
    """A step of a large global batch: volumes wait on the host in 16 bits and are encoded a few at a time."""
    from ctx_distill.losses.contrastive import contrastive_loss
    from ctx_distill.training.cached_batches import encode_in_micro_batches, split_rows
    from ctx_distill.types import CTBatch

    model, reports = dual_encoder(job, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=device.type == "cuda" or None)
    few = torch.rand(min(job.batch, 16), 1, *job.shape, device=device) * 2 - 1  # drawing a thousand takes minutes
    volumes = few.to("cpu", torch.float16).repeat(-(-job.batch // len(few)), 1, 1, 1, 1)[: job.batch]
    del few
    rows = torch.arange(job.batch)
    whole = CTBatch(volumes, rows.to(device), rows.to(device), reports)

    def encode(part: CTBatch) -> tuple[Tensor, ...]:
        return model.encode_alone(part.volume)[0], model.encode_text(part.report)

    def step(batch: CTBatch = whole) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in job.precision):
            image, text = encode_in_micro_batches(
                encode, batch, job.micro_batch or job.batch, parameters, device, torch.float32
            )
            loss = contrastive_loss(image, text, model.logit_scale.exp(), study=batch.study)["total"]
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    step(split_rows(whole, 2 * (job.micro_batch or job.batch))[0])  # compiles: one step of all volumes is timed
    return timed(job, device, step, memory)

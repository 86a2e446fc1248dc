"""FSDP2 under Lightning: the trained encoders' weights, gradients and optimiser state divided among the ranks.

`--trainer.strategy=fsdp2`, for stages 2 and 3. `torch.distributed.fsdp.fully_shard` divides the CT encoder and a report tower that learns, block by block. What is left (projections, the scalar
temperature, a bias) is a few hundred thousand numbers: every rank keeps all of it and gradients are averaged. Gradients
follow the convention of `ctx_distill.distributed`, as under DDP. A checkpoint is one file with whole tensors under their
usual names; once trained, the whole weights are gathered on every rank, and all that follows knows nothing of shards.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.export import register_dataclass

from ctx_distill.distributed import world_size
from ctx_distill.errors import InputError
from ctx_distill.models.ct_encoder import CTEncoder
from ctx_distill.models.text_encoder import TextEncoder
from ctx_distill.types import EncoderOutput

NAME = "fsdp2"


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with every rank in one data-parallel group and checkpoints in one file."""

    def __init__(self, process_group_backend: str | None = None, timeout_minutes: float = 30.0) -> None:
        """Set it up.

        Args:
            process_group_backend: nccl or gloo; None chooses by the device.
            timeout_minutes: after which a collective that waits is an error.
        """
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )

    def setup_environment(self) -> None:
        """One data-parallel group of all ranks."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


StrategyRegistry.register(NAME, FullyShardedStrategy, "FSDP2 of stages 2 and 3", override=True)


class Shards:
    """The sharded modules of a task, each with the whole module that takes its place again after training."""

    def __init__(self, task: L.LightningModule, mesh: DeviceMesh) -> None:
        """Shard the task's trained encoders in place; collective.

        Args:
            task: its trainable weights are the same on every rank from here on.
            mesh: of one dimension.
        """
        _make_known_to_fsdp()
        self._task = task
        for tensor in [*(p.data for p in task.parameters() if p.requires_grad), *task.buffers()]:
            on_device = tensor.to(mesh.device_type)
            dist.broadcast(on_device, src=0)
            tensor.copy_(on_device)
        encoders = (each for each in task.modules() if isinstance(each, (CTEncoder, TextEncoder)))
        trained = [each for each in encoders if any(p.requires_grad for p in each.parameters())]
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        for encoder in trained:
            whole = copy.deepcopy(encoder)
            _shard(encoder, mesh)
            self._pairs.append((encoder, whole))
        for parameter in task.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def gather(self) -> None:
        """Put modules with whole weights back in the task; collective.

        Lightning has moved the shards to the CPU at the end of the loop, whose tensors NCCL refuses: each goes to the
        device of its mesh while it is gathered.
        """
        for sharded, whole in self._pairs:
            values = dict(sharded.named_parameters()) | dict(sharded.named_buffers())
            for name, place in [*whole.named_parameters(), *whole.named_buffers()]:
                value = values[name]
                if isinstance(value, DTensor):
                    value = cast(DTensor, value.to(value.device_mesh.device_type)).full_tensor()
                place.copy_(value)
            whole.train(sharded.training)
            for parent in list(self._task.modules()):
                for name, child in list(parent._modules.items()):
                    if child is sharded:
                        setattr(parent, name, whole)
        self._pairs = []


def shard_for_training(task: L.LightningModule, unfit: dict[str, bool]) -> Shards | None:
    """Shard a task's encoders where the trainer's strategy asks for it and the trainer is about to fit.

    Args:
        task: attached to its trainer.
        unfit: settings that cannot be met with sharded weights, by name, and whether they are asked for.

    Raises:
        InputError: one is asked for, or Lightning's own model-parallel strategy is given.
    """
    trainer = task.trainer
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy) or trainer.state.fn != TrainerFn.FITTING:
        return None
    if not isinstance(strategy, FullyShardedStrategy):
        raise InputError(
            f"trainer.strategy is {type(strategy).__name__}, which divides each node's GPUs for tensor parallelism; set "
            f"--trainer.strategy={NAME}."
        )
    by_value = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm == "value"
    asked = [name for name, value in {**unfit, "trainer.gradient_clip_algorithm=value": by_value}.items() if value]
    if asked:
        raise InputError(
            f"{type(task).__name__} with FSDP2 (trainer.strategy {type(strategy).__name__}): {', '.join(asked)} cannot be "
            "had with sharded weights. Leave it out, or set --trainer.strategy=ddp."
        )
    return Shards(task, strategy.device_mesh["data_parallel"])


def by_layout(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each parameter group divided into sharded and whole tensors: an optimizer computes a group's tensors together."""
    divided = []
    for group in groups:
        for sharded in (False, True):
            chosen = [p for p in group["params"] if isinstance(p, DTensor) == sharded]
            if chosen:
                divided.append({**group, "params": chosen})
    return divided


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """What is gathered for its own forward: a CT encoder's layers, a transformer's items of module lists."""
    if isinstance(encoder, CTEncoder):
        return [layer[0] for layer in encoder.layers() if layer[0] is not encoder]
    lists = [each for each in encoder.modules() if isinstance(each, nn.ModuleList)]
    return [block for each in reversed(lists) for block in each]


def _shard(encoder: nn.Module, mesh: DeviceMesh) -> None:
    """Each block, then what is around them; scalars stay whole."""
    whole = {p for p in encoder.parameters() if p.ndim == 0}
    for block in _blocks(encoder):
        if any(p not in whole for p in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(encoder, mesh=mesh, ignored_params=whole)


def _average_gradient(parameter: Tensor) -> None:
    """DDP's mean. What was accumulated before is the same on every rank, and stays what it is."""
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()


_known = False


def _make_known_to_fsdp() -> None:
    """FSDP finds the tensors of an output, where backward begins, by torch's registry of containers."""
    global _known
    if not _known:
        register_dataclass(cast(Any, EncoderOutput))
        _known = True

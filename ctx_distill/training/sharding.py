"""FSDP2 under Lightning: shard weights, gradients and optimiser state of the trained encoders over the ranks.

Enabled by `--trainer.strategy=fsdp2`, for stages 2 and 3. `torch.distributed.fsdp.fully_shard` shards the CT encoder and a
trainable report tower block by block. The rest (projections, temperature, bias) is small: every rank keeps a full copy and
its gradients are averaged. Gradients follow the convention of `ctx_distill.distributed`, as with DDP. A checkpoint is one
file of full tensors under their usual names. After training, the full weights are gathered on every rank.
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
        """Configure the strategy.

        Args:
            process_group_backend: NCCL or gloo; None chooses by the device.
            timeout_minutes: Timeout of collectives.
        """
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )

    def setup_environment(self) -> None:
        """Put all ranks in one data-parallel group."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


StrategyRegistry.register(NAME, FullyShardedStrategy, "FSDP2 of stages 2 and 3", override=True)


class Shards:
    """The sharded modules of a task, each with the full module that replaces it after training."""

    def __init__(self, task: L.LightningModule, mesh: DeviceMesh) -> None:
        """Shard the task's trained encoders in place (collective).

        Args:
            task: The task; its trainable weights are first broadcast from rank 0.
            mesh: a one-dimensional mesh.
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
        """Replace the sharded modules by modules with full weights (collective).

        Lightning has moved the shards to the CPU at the end of the loop, and NCCL rejects CPU tensors, so each shard is
        moved to the device of its mesh while it is gathered.
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
    """Shard a task's encoders if the trainer's strategy is FSDP2 and the trainer is about to fit.

    Args:
        task: a task that is attached to its trainer.
        unfit: Settings that are incompatible with sharded weights, by name, and whether they are enabled.

    Raises:
        InputError: An incompatible setting is enabled, or the strategy is Lightning's model-parallel strategy.
    """
    trainer = task.trainer
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy) or trainer.state.fn != TrainerFn.FITTING:
        return None
    if not isinstance(strategy, FullyShardedStrategy):
        raise InputError(
            f"trainer.strategy is {type(strategy).__name__}, which uses tensor parallelism within each node; expected "
            f"{NAME}. Set --trainer.strategy={NAME}."
        )
    by_value = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm == "value"
    enabled = [name for name, value in {**unfit, "trainer.gradient_clip_algorithm=value": by_value}.items() if value]
    if enabled:
        raise InputError(
            f"{type(task).__name__} with FSDP2 (trainer.strategy {type(strategy).__name__}): {', '.join(enabled)} is not "
            "supported with sharded weights. Disable it, or set --trainer.strategy=ddp."
        )
    return Shards(task, strategy.device_mesh["data_parallel"])


def by_layout(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split each parameter group into sharded and full tensors, because an optimizer processes a group together."""
    divided = []
    for group in groups:
        for sharded in (False, True):
            chosen = [p for p in group["params"] if isinstance(p, DTensor) == sharded]
            if chosen:
                divided.append({**group, "params": chosen})
    return divided


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """Return the modules that are gathered separately: a CT encoder's layers, or the items of module lists."""
    if isinstance(encoder, CTEncoder):
        return [layer[0] for layer in encoder.layers() if layer[0] is not encoder]
    lists = [each for each in encoder.modules() if isinstance(each, nn.ModuleList)]
    return [block for each in reversed(lists) for block in each]


def _shard(encoder: nn.Module, mesh: DeviceMesh) -> None:
    """Shard each block, then the rest of the encoder; scalars are not sharded."""
    whole = {p for p in encoder.parameters() if p.ndim == 0}
    for block in _blocks(encoder):
        if any(p not in whole for p in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(encoder, mesh=mesh, ignored_params=whole)


def _average_gradient(parameter: Tensor) -> None:
    """Average the gradient over the ranks, as DDP does; earlier accumulated gradients are equal and do not change."""
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()


_known = False


def _make_known_to_fsdp() -> None:
    """Register `EncoderOutput`, because FSDP finds an output's tensors through torch's registry of containers."""
    global _known
    if not _known:
        register_dataclass(cast(Any, EncoderOutput))
        _known = True

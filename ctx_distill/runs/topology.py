"""What a SLURM job says of nodes and tasks, as settings of the trainer.

They stand beside a stage's request, not in it: a run that is requeued on another number of nodes is the same request.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ctx_distill.errors import InputError

_SLURM = "lightning.pytorch.plugins.environments.SLURMEnvironment"
_LOCAL = "lightning.pytorch.plugins.environments.LightningEnvironment"


@dataclass(frozen=True)
class Topology:
    """The processes of a job step that `srun` started, this one among them.

    Attributes:
        nodes: machines.
        tasks: processes a machine, one a GPU.
        gpus: GPUs a machine; 0 trains on CPUs, with gloo.
    """

    nodes: int
    tasks: int
    gpus: int

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.nodes * self.tasks


@dataclass(frozen=True)
class TrainerSettings:
    """LightningCLI arguments: `before` the user's overrides, which beat them, and `after`, which beat the user's."""

    before: list[str]
    after: list[str]


def job_topology(environment: Mapping[str, str] = os.environ) -> Topology | None:
    """The topology of this process's job step; None outside of SLURM, and in the shell of a job of one task.

    Raises:
        InputError: in the shell of a job of several tasks, where this process would wait for ever for the others; tasks
            spread unevenly, or more of them than GPUs.
    """
    tasks = _number(environment, "SLURM_NTASKS", 1)
    # A shell in a job has no step, and that of `salloc` a step of one task beside the job's count.
    if "SLURM_STEP_ID" not in environment or _number(environment, "SLURM_STEP_NUM_TASKS", tasks) != tasks:
        if "SLURM_JOB_ID" in environment and max(tasks, _number(environment, "SLURM_NNODES", 1)) > 1:
            raise InputError(
                f"SLURM job {environment['SLURM_JOB_ID']} has {environment.get('SLURM_NNODES', 1)} nodes and {tasks} tasks, and"
                " this process was started without srun: it would wait for the others for ever. Start it with"
                " `srun --kill-on-bad-exit=1 ctx-distill ...`, or submit the stage with `ctx-distill submit`."
            )
        return None
    nodes = _number(environment, "SLURM_NNODES", 1)
    each = _number(environment, "SLURM_NTASKS_PER_NODE", tasks if nodes == 1 else 0)
    if tasks != nodes * each or (tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environment):
        raise InputError(
            f"SLURM step of {tasks} tasks on {nodes} nodes, SLURM_NTASKS_PER_NODE {environment.get('SLURM_NTASKS_PER_NODE')}:"
            " expected the same number of tasks on every node. Give the job --nodes and --ntasks-per-node."
        )
    gpus = _number(environment, "SLURM_GPUS_ON_NODE", 0)
    if 0 < gpus < each:
        raise InputError(
            f"SLURM step of {each} tasks a node with {gpus} GPUs a node: expected one task a GPU. Give the job"
            f" --ntasks-per-node={gpus}, or --gres=gpu:{each}."
        )
    return Topology(nodes, each, gpus)


def starts_with_others(nodes: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether other ranks' processes start at the same time as this one: by srun, by torchrun, or on other nodes.

    The processes that Lightning starts for the devices of its node begin when rank zero has made the folder ready; those
    do not count.

    Args:
        nodes: `trainer.num_nodes`; some platforms set NODE_RANK on a single node too.
        environment: of this process.
    """
    topology = job_topology(environment)
    by_torchrun = "RANK" in environment and _number(environment, "WORLD_SIZE", 1) > 1
    by_node = nodes > 1 and "NODE_RANK" in environment and "LOCAL_RANK" not in environment
    return by_torchrun or by_node or (topology is not None and topology.size > 1)


def trainer_settings(environment: Mapping[str, str] = os.environ) -> TrainerSettings:
    """The arguments for LightningCLI that the job's topology asks for; none outside of SLURM.

    Lightning's own requeueing is off: it loses the place within an epoch. `docs/slurm.md` has what is done instead.

    Raises:
        InputError: see `job_topology`.
    """
    topology = job_topology(environment)
    if topology is None:
        # Lightning takes a job's shell for a step as soon as it sees SLURM_NTASKS.
        return TrainerSettings([], [_plugin(_LOCAL)] if "SLURM_NTASKS" in environment else [])
    after = [f"--trainer.devices={topology.tasks}", f"--trainer.num_nodes={topology.nodes}"]
    return TrainerSettings(
        [f"--trainer.accelerator={'gpu' if topology.gpus else 'cpu'}"],
        [*after, _plugin(_SLURM, auto_requeue=False)],
    )


def _plugin(name: str, **arguments: bool) -> str:
    return "--trainer.plugins=" + json.dumps([{"class_path": name, "init_args": arguments}])


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else default

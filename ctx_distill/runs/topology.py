"""Nodes and tasks of a SLURM job, as settings of the trainer.

They are no part of a stage's request: a run that is requeued on another number of nodes has the same request.
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
    """The processes of the job step that `srun` started.

    Attributes:
        nodes: machines.
        tasks: processes per machine, one per GPU.
        gpus: GPUs per machine; 0 trains on CPUs, with gloo.
    """

    nodes: int
    tasks: int
    gpus: int

    @property
    def size(self) -> int:
        """Return the total number of processes."""
        return self.nodes * self.tasks


@dataclass(frozen=True)
class TrainerSettings:
    """LightningCLI arguments: `before` the user's overrides, which take precedence, and `after`, which override them."""

    before: list[str]
    after: list[str]


def job_topology(environment: Mapping[str, str] = os.environ) -> Topology | None:
    """Return the topology of this process's job step; None outside of SLURM, and in the shell of a job of one task.

    Raises:
        InputError: in the shell of a job of several tasks, where this process would wait for the others forever; tasks
            are spread unevenly, or outnumber the GPUs.
    """
    tasks = _number(environment, "SLURM_NTASKS", 1)
    # The shell of a job has no step; the shell of `salloc` has a step of one task, whatever the job's count is.
    if "SLURM_STEP_ID" not in environment or _number(environment, "SLURM_STEP_NUM_TASKS", tasks) != tasks:
        if "SLURM_JOB_ID" in environment and max(tasks, _number(environment, "SLURM_NNODES", 1)) > 1:
            raise InputError(
                f"SLURM job {environment['SLURM_JOB_ID']} has {environment.get('SLURM_NNODES', 1)} nodes and {tasks} tasks, and"
                " this process was started without srun, so that it would wait for the others forever. Start it with"
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
            f"SLURM step of {each} tasks per node with {gpus} GPUs per node: expected one task per GPU. Give the job"
            f" --ntasks-per-node={gpus}, or --gres=gpu:{each}."
        )
    return Topology(nodes, each, gpus)


def starts_with_others(nodes: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether other ranks start at the same time as this one: by srun, by torchrun, or on other nodes.

    Processes that Lightning starts for the devices of its node do not count: they start after rank zero has made the
    folder ready.

    Args:
        nodes: `trainer.num_nodes`; some platforms set NODE_RANK on a single node too.
        environment: the environment variables.
    """
    topology = job_topology(environment)
    by_torchrun = "RANK" in environment and _number(environment, "WORLD_SIZE", 1) > 1
    by_node = nodes > 1 and "NODE_RANK" in environment and "LOCAL_RANK" not in environment
    return by_torchrun or by_node or (topology is not None and topology.size > 1)


def trainer_settings(environment: Mapping[str, str] = os.environ) -> TrainerSettings:
    """Return the LightningCLI arguments for the job's topology; none outside of SLURM.

    Lightning's requeueing is switched off, because it loses the position within an epoch. `docs/slurm.md` describes the
    replacement.

    Raises:
        InputError: see `job_topology`.
    """
    topology = job_topology(environment)
    if topology is None:
        # Lightning mistakes the shell of a job for a step if SLURM_NTASKS is set.
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

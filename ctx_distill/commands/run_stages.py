"""Run several stages in order, skip complete ones, then write the joined metrics, the table and the page."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from ctx_distill import __version__, signals
from ctx_distill.errors import InputError
from ctx_distill.runs.result_table import result_table
from ctx_distill.runs.run_folder import is_first_process, join_metrics, note_run
from ctx_distill.runs.run_options import RunOptions
from ctx_distill.runs.runner import StageRequest, run_stage
from ctx_distill.runs.stage_table import Stage, override_for, stage_config
from ctx_distill.runs.topology import starts_with_others


def run_stages(
    stages: list[Stage], options: RunOptions, overrides: list[str], *, force: bool = False, isolated: bool = False
) -> None:
    """Run stages in order, in this process or, where a trainer starts several processes, in one process per stage.

    The caller holds the lock on the run folder.

    Raises:
        InputError: bad input, or an isolated stage that ended with an error; several stages, or a forced one, in
            processes that were started together, since ranks would move from stage to stage at different times.
    """
    if starts_with_others(max(_nodes(stage, options.preset, overrides) for stage in stages)):
        if len(stages) > 1:
            raise InputError(
                f"{len(stages)} stages in processes that srun or torchrun started together, or on several nodes"
                " (NODE_RANK) are not supported. Run them one by one, as `ctx-distill submit all` does."
            )
        if force:
            raise InputError(
                "--force in processes that srun or torchrun started together, or on several nodes (NODE_RANK): one of them"
                f" could still read what another one moves. Move {options.run / stages[0].folder} yourself instead."
            )
    for stage in stages:
        request = StageRequest(stage, options.data, options.run, options.preset, overrides, options.expert)
        alone = len(stages) > 1 and (isolated or _several_devices(request))
        if alone and not request.complete:
            _run_alone(stage, options, overrides, force)
        else:
            run_stage(request, force=force)
    if not is_first_process():
        return
    note_run(options.run, command="ctx-distill " + shlex.join(sys.argv[1:]), version=__version__)
    metrics = join_metrics(options.run)
    page = _write_page(options.run)
    print(result_table(metrics))
    print(f"\nresults: {options.run / 'metrics.json'}\npage:    {page}")


def _nodes(stage: Stage, preset: str, overrides: list[str]) -> int:
    """Return `trainer.num_nodes` of a stage."""
    given = [argument for argument in override_for(stage, overrides) if argument.startswith("--trainer.num_nodes=")]
    trainer: dict[str, Any] = stage_config(stage, preset).get("trainer", {})
    return int(given[-1].partition("=")[2] if given else trainer.get("num_nodes", 1))


def _several_devices(request: StageRequest) -> bool:
    trainer: dict[str, Any] = request.config.get("trainer", {})
    devices = str(trainer.get("devices", 1))
    for argument in request.overrides:
        if argument.startswith("--trainer.devices"):
            devices = argument.partition("=")[2] or "auto"
    if devices == "auto":
        import torch

        return torch.cuda.device_count() > 1
    return devices != "1" or _nodes(request.stage, request.preset, request.overrides) > 1


def _run_alone(stage: Stage, options: RunOptions, overrides: list[str], force: bool) -> None:
    command = [sys.executable, "-m", "ctx_distill", stage.name, *options.arguments(), *(["--force"] if force else [])]
    status = subprocess.call([*command, *overrides])
    if status == signals.STOPPED:
        raise signals.StopRequested(stage.name)
    if status:
        raise InputError(f"stage `{stage.name}` ended with status {status}; its error message is printed above.")


def _write_page(run: Path) -> Path:
    from ctx_distill.probing.run_curve import write_few_labels
    from ctx_distill.reporting.run_page import build_page
    from ctx_distill.reporting.saliency_maps import write_saliency

    write_few_labels(run)
    write_saliency(run)
    return build_page(run)

"""Stages as SLURM jobs: the batch scripts beside the run, and the commands that submit them.

    RUN/slurm/<job>.sbatch          a job: its options, SETUP, and one `srun` per stage (from stages/slurm/job.sbatch)
    RUN/slurm/submit-<target>.sh    submits the target's jobs, each after the jobs that it needs
    RUN/slurm/<job>-<number>.out    the output of a job, over all its requeues

Nothing heavy is imported here: a login node need not have torch.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ctx_distill.errors import InputError
from ctx_distill.files import write_text
from ctx_distill.run_files import CHECKPOINTS
from ctx_distill.runs.overrides import check_overrides
from ctx_distill.runs.run_options import RunOptions
from ctx_distill.runs.runner import find_manifest
from ctx_distill.runs.stage_table import HEADS, STAGES, Stage, load_preset, stages_folder

TARGETS = (*STAGES, "heads", "prepare", "all")
_AFTER = {"index": ("expert",), "distill": ("prepare", "index"), "align": ("distill",), "heads": ("align",)}
_PREPARED = "--data.init_args.prepared="
# Variables of the submitting shell's job, or of make, that the job must not inherit.
_DROPPED = re.compile(r"^(SLURM_(?!CONF$|CLUSTERS$)|SRUN_|MAKE|MFLAGS$|PMI|CTX_DISTILL_LOCK_HELD$)")


@dataclass(frozen=True)
class JobOptions:
    """What is requested from SLURM.

    Attributes:
        nodes: Machines per job.
        gpus: GPUs per machine; 0 trains on CPUs.
        tasks: Processes per machine of CPU jobs. Default: 1. With GPUs: one per GPU.
        cpus: Cores per process. Default: the cluster's.
        time: Time limit, as sbatch takes it. Default: the partition's.
        sbatch: More sbatch options: `'--partition=gpu --account=lab'`.
        sbatch_prepare: sbatch options of the preparing jobs, instead of `sbatch`.
        setup: Shell lines that the job runs first: modules, a container.
        parts: Jobs of the array that prepares the volumes; 0 prepares none.
        prepared: Folder of the prepared volumes. Default: `RUN/prepared`.
    """

    nodes: int = 1
    gpus: int = 1
    tasks: int | None = None
    cpus: int | None = None
    time: str = ""
    sbatch: str = ""
    sbatch_prepare: str | None = None
    setup: str = ""
    parts: int = 8
    prepared: Path | None = None

    def __post_init__(self) -> None:
        counts = {
            "nodes": self.nodes,
            "gpus": self.gpus + 1,
            "tasks": self.tasks,
            "cpus": self.cpus,
            "parts": self.parts + 1,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                least = 0 if name in ("gpus", "parts") else 1
                raise InputError(f"--{name} {getattr(self, name)}: expected {least} or more.")
        if self.gpus and self.tasks not in (None, self.gpus):
            raise InputError(
                f"--gpus {self.gpus} --tasks {self.tasks}: one process drives one GPU. Omit --tasks, or give --gpus 0"
                " --tasks n for CPU jobs of n processes per node."
            )

    @property
    def tasks_per_node(self) -> int:
        """Return the number of processes per machine."""
        return self.gpus or self.tasks or 1


@dataclass(frozen=True)
class SlurmJob:
    """One job: its name, the arguments of each step, the jobs that it waits for, the size of its array."""

    name: str
    steps: list[list[str]]
    after: tuple[str, ...] = ()
    array: int | None = None
    stages: list[Stage] = field(default_factory=list)


def plan_jobs(target: str, run: RunOptions, overrides: list[str], options: JobOptions) -> list[SlurmJob]:
    """Return the jobs of a target, in an order in which they can be submitted.

    Args:
        target: one of `TARGETS`.
        run: options of the stages.
        overrides: LightningCLI overrides of the stages.
        options: options of the jobs.

    Raises:
        InputError: the manifest or the preset does not exist; an override is wrong; `--force` is given, with which a
            requeued job would start from the beginning.
    """
    if "--force" in overrides:
        raise InputError(
            "--force: each requeued job would start from the beginning. Remove the stage's folder in RUN instead."
        )
    if target not in TARGETS:
        raise InputError(f"unknown target {target!r}; choose from: {', '.join(TARGETS)}")
    load_preset(run.preset)
    names = [target]
    if target == "all":
        names = [*(() if run.expert else ("expert",)), "index", "distill", "align", "heads"]
    stages = {
        name: [STAGES[step] for step in (HEADS if name == "heads" else (name,))] for name in names if name != "prepare"
    }
    for kind in sorted({kind for each in stages.values() for stage in each for kind in stage.reads}):
        find_manifest(run.data, kind)
    check_overrides([stage for each in stages.values() for stage in each], run.preset, overrides)
    own_prepared = any(argument.partition("=")[0].endswith(_PREPARED.rstrip("=")) for argument in overrides)
    prepares = target == "prepare" or (target == "all" and options.parts > 0 and not own_prepared)
    folder = (options.prepared or run.run / "prepared").resolve()
    jobs = [_prepare_job(run, options, folder)] if prepares else []
    for name, each in stages.items():
        reads_prepared = not own_prepared and (prepares or options.prepared is not None)
        steps = [
            [stage.name, *run.arguments(), *overrides, *_from_prepared(stage, folder, reads_prepared)] for stage in each
        ]
        planned = {job.name for job in jobs}
        jobs.append(
            SlurmJob(name, steps, tuple(before for before in _AFTER.get(name, ()) if before in planned), stages=each)
        )
    return jobs


def _prepare_job(run: RunOptions, options: JobOptions, folder: Path) -> SlurmJob:
    manifest = find_manifest(run.data, "ct").resolve()
    arguments = run.arguments()
    preset = arguments[arguments.index("--preset") + 1]
    cores = ["--workers", str(options.cpus or 1)]
    return SlurmJob(
        "prepare", [["prepare", str(manifest), str(folder), "--preset", preset, *cores]], array=max(1, options.parts)
    )


def _from_prepared(stage: Stage, folder: Path, prepared: bool) -> list[str]:
    """Return the override for prepared volumes, for stages that read CTs and no radiographs."""
    return [f"{_PREPARED}{folder}"] if prepared and stage.reads == ("ct",) else []


def script_text(job: SlurmJob, run: RunOptions, options: JobOptions) -> str:
    """Return the batch script of a job."""
    folder = run.run.resolve()
    values = {
        "SBATCH": "\n".join(f"#SBATCH {line}" for line in _sbatch_lines(job, folder, options)),
        "SCRIPT": shlex.quote(str(folder / "slurm" / f"{job.name}.sbatch")),
        "NAME": shlex.quote(job.name),
        "RUN": shlex.quote(str(folder)),
        "CHECKPOINTS": shlex.join(str(folder / stage.folder / CHECKPOINTS) for stage in job.stages),
        "PYTHON": shlex.quote(sys.executable),
        "DEVICES": "" if options.gpus and job.array is None else "export CUDA_VISIBLE_DEVICES=",
        "SETUP": options.setup,
        "STEPS": "\n".join(f"step {shlex.join(step)}" for step in job.steps),
    }
    template = (stages_folder() / "slurm" / "job.sbatch").read_text(encoding="utf-8")
    return re.sub("@@([A-Z]+)@@", lambda found: values[found[1]], template)


def _sbatch_lines(job: SlurmJob, folder: Path, options: JobOptions) -> list[str]:
    single = job.array is not None
    output = folder / "slurm" / (f"{job.name}-%A_%a.out" if single else f"{job.name}-%j.out")
    for path in (output, Path.cwd()):
        if re.search(r'["\\\n]|%(?![Aaj][_.])', str(path)):
            raise InputError(
                f'{path}: SLURM does not take a path with ", %, a backslash or a new line. Give another --run.'
            )
    lines = [
        f"--job-name=ctx-{job.name}",
        f"--nodes={1 if single else options.nodes}",
        f"--ntasks-per-node={1 if single else options.tasks_per_node}",
        "--signal=USR1@90",
        "--requeue",
        "--open-mode=append",
        "--kill-on-invalid-dep=yes",
        f"--output={_quoted(str(output))}",
        f"--chdir={_quoted(str(Path.cwd()))}",
    ]
    if single:
        lines.append(f"--array=0-{job.array - 1 if job.array else 0}")
    elif options.gpus:
        lines.append(f"--gres=gpu:{options.gpus}")
    if options.cpus:
        lines.append(f"--cpus-per-task={options.cpus}")
    if options.time:
        lines.append(f"--time={options.time}")
    more = options.sbatch_prepare if single and options.sbatch_prepare is not None else options.sbatch
    return [*lines, *_own_lines(more)]


def _own_lines(text: str) -> list[str]:
    """Return the user's options, one per line; a separate value stays on the line of its option."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--sbatch {text!r}: {error}; expected options as sbatch takes them.") from error
    lines: list[str] = []
    for word in words:
        if word.startswith("-") or not lines:
            lines.append(_quoted(word))
        else:
            lines[-1] += " " + _quoted(word)
    if lines and not lines[0].startswith("-"):
        raise InputError(
            f"--sbatch {text!r}: {words[0]!r} is no option; expected options such as '--partition=gpu --account=lab'."
        )
    return lines


def _quoted(word: str) -> str:
    """Return a word of an #SBATCH line, in double quotes if sbatch needs them."""
    return f'"{word}"' if re.search(r"[\s#']", word) else word


def submission_text(jobs: list[SlurmJob], folder: Path) -> str:
    """Return the shell script that submits jobs in order, each after the jobs that it needs."""
    lines = ["#!/bin/bash", "# Written by `ctx-distill submit`.", "set -euo pipefail"]
    for job in jobs:
        after = "".join(f":${name.replace('-', '_')}" for name in job.after)
        name, dependency = job.name.replace("-", "_"), f' "--dependency=afterok{after}"' if after else ""
        lines.append(f"{name}=$(sbatch --parsable{dependency} {shlex.quote(str(folder / f'{job.name}.sbatch'))})")
        lines.append(f'{name}=${{{name}%%;*}}; echo "{job.name}: job ${name}"')
    return "\n".join(lines) + "\n"


def submit(target: str, run: RunOptions, overrides: list[str], options: JobOptions, dry_run: bool = False) -> str:
    """Write the scripts of a target beside the run, print them, and submit them.

    Args:
        target: one of `TARGETS`.
        run: options of the stages.
        overrides: LightningCLI overrides of the stages.
        options: options of the jobs.
        dry_run: write and print the scripts without submitting them.

    Returns:
        The numbers of the jobs, or the path of the scripts.

    Raises:
        InputError: bad input; no `sbatch` on this machine; sbatch refused a job.
    """
    jobs = plan_jobs(target, run, overrides, options)
    folder = run.run.resolve() / "slurm"
    submission = folder / f"submit-{target}.sh"
    texts = {folder / f"{job.name}.sbatch": script_text(job, run, options) for job in jobs}
    texts[submission] = submission_text(jobs, folder)
    for path, text in texts.items():
        try:
            write_text(path, text)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}). Give another folder with --run."
            ) from error
        print(f"== {path}\n{text}")
    how = f"bash {shlex.quote(str(submission))}"
    if dry_run:
        return f"written, not submitted; to submit: {how}"
    if shutil.which("sbatch") is None:
        raise InputError(f"{folder}: the scripts are written, but this machine has no `sbatch`. On a login node: {how}")
    environment = {name: value for name, value in os.environ.items() if not _DROPPED.match(name)}
    done = subprocess.run(["bash", str(submission)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        before = (
            f" Submitted before that: {'; '.join(done.stdout.split(chr(10))[:-1])} (scancel ends them)."
            if done.stdout
            else ""
        )
        raise InputError(f"{submission}: sbatch refused a job: {done.stderr.strip()}.{before}")
    return f"{done.stdout}to watch: squeue --me; logs: {folder}"

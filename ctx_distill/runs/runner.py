"""Run one stage: LightningCLI over the merged layers, then the task, then the stage's metrics."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctx_distill import __version__, signals
from ctx_distill.errors import InputError
from ctx_distill.files import hash_file, write_json, write_text
from ctx_distill.run_files import ARTEFACT, CONFIG_FILE, LAYERS_FILE, METRICS_FILE, REQUEST_FILE
from ctx_distill.runs.run_folder import (
    is_complete,
    is_first_process,
    join_metrics,
    note_run,
    note_stage,
    open_stage,
    put_back,
    read_json,
)
from ctx_distill.runs.stage_table import STAGES, Stage, override_for, request_key, source_fingerprint, stage_config
from ctx_distill.runs.topology import TrainerSettings, trainer_settings

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

MANIFEST_SUFFIXES = (".csv", ".parquet")


def find_manifest(data: Path, kind: str) -> Path:
    """Return the manifest of a kind ("ct", "xray") in a data folder, CSV or Parquet.

    Raises:
        InputError: the folder holds none.
    """
    for suffix in MANIFEST_SUFFIXES:
        if (data / f"{kind}{suffix}").is_file():
            return data / f"{kind}{suffix}"
    raise InputError(
        f"{data}: holds no {kind}.csv or {kind}.parquet. Give the folder of both manifests with --data; "
        "data_manifests/README.md describes them."
    )


class StageRequest:
    """A request to run one stage: configuration, overrides and inputs, with their key.

    Args:
        stage: which stage.
        data: folder of the manifests.
        run: the run folder.
        preset: name or path of the preset.
        overrides: LightningCLI overrides.
        expert: folder or hub name of an expert that is used instead of the run's.
    """

    def __init__(
        self, stage: Stage, data: Path, run: Path, preset: str, overrides: list[str], expert: str | None = None
    ) -> None:
        self.stage, self.run, self.preset = stage, run, preset
        self.folder = run / stage.folder
        self.overrides = override_for(stage, overrides)
        self.config = stage_config(stage, preset)
        self.manifests = {kind: find_manifest(data, kind) for kind in stage.reads}
        self.sources = {
            argument: expert if maker == "expert" and expert else str(run / STAGES[maker].folder / ARTEFACT)
            for argument, maker in stage.needs
        }
        self.inputs = {kind: hash_file(path) for kind, path in self.manifests.items()}
        self.inputs |= {name: source_fingerprint(source) for name, source in self.sources.items()}
        if expert:
            self.inputs |= {f"{name} from": "elsewhere" for name, maker in stage.needs if maker == "expert"}
        self.key = request_key(self.config, self.overrides, self.inputs, __version__)

    @property
    def complete(self) -> bool:
        """Return whether the run folder holds the finished result of this request."""
        return is_complete(self.folder, self.key)

    def check_sources(self) -> None:
        """Check that the artefacts of the earlier stages exist.

        Raises:
            InputError: one is missing; the message names the stage that makes it.
        """
        makers = dict(self.stage.needs)
        for argument, source in self.sources.items():
            overridden = any(item.startswith(f"--model.init_args.{argument}") for item in self.overrides)
            if source.startswith("hf-hub:") or overridden or Path(source).is_dir():
                continue
            maker = STAGES[makers[argument]]
            raise InputError(
                f"{source}: no {maker.title} artefact, which {self.stage.title} needs. "
                f"Run `ctx-distill {maker.name} --data ... --run ...` first, or give one with "
                f"--model.init_args.{argument}=<folder>."
            )

    def filled_config(self) -> dict[str, Any]:
        """Return the merged layers with this run's paths in place of `{expert}`, `{ct}` and so on."""
        paths = {f"{{{kind}}}": str(path) for kind, path in self.manifests.items()}
        paths |= {f"{{{name}}}": source for name, source in self.sources.items()}
        paths["{folder}"] = str(self.folder)
        filled: dict[str, Any] = fill(self.config, paths)
        return filled


def fill(value: Any, paths: dict[str, str]) -> Any:
    """Replace values that are a placeholder by the placeholder's path."""
    if isinstance(value, dict):
        return {name: fill(item, paths) for name, item in value.items()}
    if isinstance(value, list):
        return [fill(item, paths) for item in value]
    return paths.get(value, value) if isinstance(value, str) else value


def run_stage(request: StageRequest, *, force: bool = False) -> None:
    """Run a stage unless it is complete; its metrics are written last and mark it as complete.

    The caller holds the lock on the run folder.

    Args:
        request: the request.
        force: rerun even if complete.
    """
    stage, folder = request.stage, request.folder
    if request.complete and not force:
        print(f"{stage.title}: complete in {folder} (--force reruns it)")
        return
    first = is_first_process()
    if first and signals.requested() is not None:  # if another rank ended here, the first one would wait for it
        raise signals.StopRequested(f"before {stage.title}")
    request.check_sources()
    job = trainer_settings()
    former: Path | None = None
    if first:
        facts = {"inputs": request.inputs, "overrides": request.overrides}
        former = open_stage(folder, request.key, facts, force=force)
        write_config(request)
        print(f"== {stage.title} -> {folder}", flush=True)
    else:
        _await_request(folder, request.key)
    started = time.monotonic()
    cli = None
    try:
        cli = _build(request, job)
        metrics, fingerprint, facts = _execute(request, cli)
    except BaseException as error:
        if first and (isinstance(error, InputError) or not _has_begun(cli)):
            put_back(folder, former)
        raise
    if first:
        note_run(request.run, version=__version__, preset=request.preset, **facts)
        note_stage(request.run, stage, seconds=round(time.monotonic() - started, 1), fingerprint=fingerprint)
        write_json(folder / METRICS_FILE, metrics)
        join_metrics(request.run)


def write_config(request: StageRequest) -> Path:
    """Write the merged layers, with paths filled in, to `layers.yaml`, which LightningCLI reads."""
    import yaml

    path = request.folder / LAYERS_FILE
    write_text(path, yaml.safe_dump(request.filled_config(), sort_keys=False))
    return path


def _await_request(folder: Path, key: str, seconds: float = 300.0) -> None:
    """Wait, on other ranks, until rank zero has made the stage's folder ready."""
    end = time.monotonic() + seconds
    while (read_json(folder / REQUEST_FILE) or {}).get("key") != key:
        if time.monotonic() > end:
            raise InputError(f"{folder}: rank zero did not open this stage within {seconds:.0f} s; see its log.")
        time.sleep(0.5)


def _has_begun(cli: LightningCLI | None) -> bool:
    """Return whether the trainer has started, so that the stage's folder may hold work to resume from."""
    return cli is not None and cli.trainer.state.fn is not None


def _build(request: StageRequest, job: TrainerSettings) -> LightningCLI:
    """Build trainer, task and data with LightningCLI."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ctx_distill.runs.lightning_cli import build

    cli = build(["--config", str(request.folder / LAYERS_FILE), *job.before, *request.overrides, *job.after])
    if is_first_process():
        cli.parser.save(cli.config, request.folder / CONFIG_FILE, overwrite=True, skip_check=True)
    return cli


def _execute(request: StageRequest, cli: LightningCLI) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Run the task.

    Returns:
        The metrics, the fingerprint of the artefact ("" on other ranks than zero), and facts for `run.json`.
    """
    from ctx_distill.runs.lightning_cli import run_task

    metrics = run_task(cli, request.folder)
    replaced = cli.datamodule.set_aside
    if replaced is not None and replaced.reasons:
        metrics["unreadable_set_aside"] = len(replaced.reasons)
    artefact = request.folder / ARTEFACT
    facts = cli.datamodule.describe() | cli.model.describe()
    # Only rank zero reads the artefact: on another rank it may still be incomplete.
    written = is_first_process() and artefact.is_dir()
    return metrics, source_fingerprint(artefact) if written else "", facts

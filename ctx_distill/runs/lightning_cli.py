"""LightningCLI in subclass mode, without subcommands: the run engine decides what is run."""

from __future__ import annotations

import logging
import re
import warnings
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.seed import isolate_rng

from ctx_distill.data.loading.datamodules import ManifestDataModule
from ctx_distill.errors import InputError
from ctx_distill.retrieval.index import refuse_two_faiss
from ctx_distill.runs.overrides import refuse_removed
from ctx_distill.runs.stage_table import read_layer
from ctx_distill.training.base_task import StageTask, TrainedTask


class StageCLI(LightningCLI):
    """`model` is a `StageTask`, `data` a `ManifestDataModule`; both are chosen by `class_path`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Seed everything from one value, workers included."""
        parser.set_defaults({"seed_everything": 0})


def build(arguments: list[str]) -> LightningCLI:
    """Parse the layers and overrides, and instantiate trainer, task and data module.

    Args:
        arguments: LightningCLI arguments, `--config FILE` first.
    """
    quieten()
    _refuse_removed(arguments)
    refuse_two_faiss()
    try:
        cli = _stage_cli(arguments)
    except ArgumentError as error:
        raise _input_error(error) from None
    except ValueError as error:
        raise _own_error(error) from None
    _outlast_the_watchdog(cli)
    cli.datamodule.trainer = cli.trainer  # its loaders depend on the device, even those that the trainer does not open
    return cli


def _refuse_removed(arguments: list[str]) -> None:
    """Refuse removed settings, on the command line and in the configuration files.

    Raises:
        InputError: one is given.
    """
    refuse_removed(arguments)
    for path in (value for flag, value in pairwise(arguments) if flag == "--config"):
        model = read_layer(Path(path)).get("model") or {}
        refuse_removed([f".survival={(model.get('init_args') or {}).get('survival', '')}"])


def run_task(cli: LightningCLI, folder: Path) -> dict[str, Any]:
    """Start the trainer's ranks, then run the task.

    Lightning starts the other processes and the process group at the first fit or predict. Before that, every process
    sees rank 0 of 1, so that `run` would use the wrong rank and world size. Fit and predict repeat these steps without
    effect.

    Args:
        cli: what `build` returned.
        folder: the stage's folder.

    Returns:
        The task's metrics.
    """
    strategy = cli.trainer.strategy
    strategy.connect(cli.model)
    with isolate_rng():  # DDP reseeds at its start: what `run` initialises must not depend on the number of ranks
        if isinstance(strategy.launcher, _SubprocessScriptLauncher):
            strategy.launcher.launch(strategy.setup_environment)
        elif strategy.launcher is None:
            strategy.setup_environment()
    return cast(StageTask, cli.model).run(cli.trainer, cli.datamodule, folder)


def _outlast_the_watchdog(cli: LightningCLI) -> None:
    """Raise torch's timeout of a collective above that of the watchdog, whose message names the hung rank."""
    strategy = cli.trainer.strategy
    if isinstance(cli.model, TrainedTask) and isinstance(strategy, (DDPStrategy, ModelParallelStrategy)):
        limit = timedelta(minutes=cli.model.survival.hang_minutes + 5)
        strategy._timeout = max(strategy._timeout or limit, limit)


def _own_error(error: BaseException) -> BaseException:
    """Return the InputError that jsonargparse wrapped while it tried the types of a value; else the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def _input_error(error: ArgumentError) -> BaseException:
    """Return the error of the parser in one or two sentences: the innermost key, without the usage of every option."""
    cause = _own_error(error)
    if isinstance(cause, InputError):
        return cause
    text = " ".join(str(error).split())
    found = re.findall(r'Parser key "([^"]+)": (?=(Expected .*? Got value: .*?)(?: - | Given value |$))', text)
    outer = re.findall(r'Parser key "([^"]+)":', text)
    if found:
        keys = [outer[0], *(key for key, _ in found[-1:] if key != outer[0])]
        return InputError(f"{'.'.join(keys)}: {found[-1][1]}. `ctx-distill settings STAGE` lists what is expected.")
    return InputError(text if len(text) <= 600 else f"{text[:600]} ...")


def _stage_cli(arguments: list[str]) -> LightningCLI:
    return StageCLI(
        StageTask,
        ManifestDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        args=arguments,
        parser_kwargs={"parser_mode": "yaml", "exit_on_error": False},
    )


def quieten() -> None:
    """Silence messages that nobody can act on, such as Lightning's device lines and dataloader hints."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR if name == "transformers" else logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run.*")
    warnings.filterwarnings("ignore", message=".*You have overridden `transfer_batch_to_device`.*")
    warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*number of training batches .* is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # it is: `EpochBatches.resume`
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used.*")
    warnings.filterwarnings("ignore", message=".*when logging on epoch level in distributed setting.*")
    warnings.filterwarnings("ignore", category=FutureWarning)

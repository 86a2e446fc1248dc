"""The commands that run stages: one per stage, `heads` (stage 4) and `all`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, Group

from ctx_distill.commands.parameters import Flat, Overrides
from ctx_distill.runs.run_options import RunOptions
from ctx_distill.runs.stage_table import HEADS, STAGES, Stage

OVERRIDES_HELP = "Any other option is a LightningCLI override, such as `--trainer.max_epochs=5`."


def add_stage_commands(app: App, group: Group) -> None:
    """Add `expert`, `index`, ..., `heads` and `all` to the application."""
    for stage in STAGES.values():
        number = f"Stage {stage.number}: " if stage.number else ""
        _add(app, group, stage.name, [stage], number + stage.summary)
    _add(app, group, "heads", [STAGES[name] for name in HEADS], f"Stage 4: run {', '.join(HEADS)}.")

    summary = "Run every stage in order, skip what is complete, write the page."

    @app.command(name="all", group=group, help=f"{summary}\n\n{OVERRIDES_HELP}")
    def run_all(
        *overrides: Overrides, options: Flat[RunOptions] = RunOptions(), force: bool = False, isolated: bool = False
    ) -> None:
        """Run all stages.

        Args:
            overrides: LightningCLI overrides; `--STAGE.` in front addresses one stage: `--distill.trainer.max_epochs=5`.
            force: Rerun even if complete.
            isolated: Run each stage in its own process.
        """
        stages = [stage for stage in STAGES.values() if stage.name != "expert" or not options.expert]
        _run(stages, options, overrides, force, isolated)


def _add(app: App, group: Group, name: str, stages: Sequence[Stage], help_text: str) -> None:
    @app.command(name=name, group=group, help=f"{help_text}\n\n{OVERRIDES_HELP}")
    def run_stage_command(*overrides: Overrides, options: Flat[RunOptions] = RunOptions(), force: bool = False) -> None:
        """Run stages.

        Args:
            overrides: LightningCLI overrides.
            force: Rerun even if complete.
        """
        _run(stages, options, overrides, force)


def _run(
    stages: Sequence[Stage], options: RunOptions, overrides: Sequence[str], force: bool, isolated: bool = False
) -> None:
    from ctx_distill.runs.overrides import check_overrides

    check_overrides(stages, options.preset, overrides)
    from ctx_distill.runs.run_folder import is_first_process, lock_run

    if is_first_process():
        print(f"{', '.join(stage.name for stage in stages)}: run {options.run}, preset {options.preset}", flush=True)
    from ctx_distill.commands.run_stages import run_stages

    with lock_run(options.run, "ctx-distill " + " ".join(sys.argv[1:])):
        run_stages(list(stages), options, list(overrides), force=force, isolated=isolated)

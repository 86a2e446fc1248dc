"""`ctx-distill submit`."""

from __future__ import annotations

from ctx_distill.commands.parameters import Flat, Overrides
from ctx_distill.runs.run_options import RunOptions
from ctx_distill.runs.slurm import JobOptions


def submit(
    target: str,
    /,
    *overrides: Overrides,
    options: Flat[RunOptions] = RunOptions(),
    job: Flat[JobOptions] = JobOptions(),
    dry_run: bool = False,
) -> None:
    """Write the SLURM job of a stage, or of the whole chain, and submit it.

    Any other option is a LightningCLI override, such as `--trainer.max_epochs=5`.

    Args:
        target: A stage, `heads` (stage 4), `prepare`, or `all`.
        overrides: LightningCLI overrides.
        dry_run: Write and show the scripts without submitting them.
    """
    from ctx_distill.runs import slurm

    print(slurm.submit(target, options, list(overrides), job, dry_run))

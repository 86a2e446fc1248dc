"""`ctx-distill ablation`."""

from __future__ import annotations

from ctx_distill.ablation.options import AblationOptions
from ctx_distill.commands.parameters import Flat


def ablation(*, options: Flat[AblationOptions] = AblationOptions()) -> None:
    """Compare the parts of the method on one cohort, with paired seeds."""
    print(f"reading the plan of the ablation in {options.run} ...", flush=True)
    from ctx_distill.ablation.driver import run_ablation
    from ctx_distill.runs.run_folder import lock_run

    with lock_run(options.run, "ctx-distill ablation"):
        print(run_ablation(options))

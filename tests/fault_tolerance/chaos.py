"""`make chaos N=50`: stages killed at random moments and finished; what they leave is that of a run that never stopped.

Each time one stage is started, with worker processes, on what the stages before it left; its whole process group is killed
with SIGKILL, one to three times in a row, and the stage is finished by the same command. Of the training stages every third
kill is inside a checkpoint write. Then SHA-256 of weights, optimiser state, predictions, metrics, curves (both without
timings) and of the order of the data seen are compared with the undisturbed run's.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from harness import FOLDERS, ROOT, TRAINED, Runner, fingerprints, with_upstream

TRIES = 20


def living(run: Path, stage: str) -> Path:
    """What stands once a stage does its work: its checkpoints' folder where it trains, its logs elsewhere."""
    return run / FOLDERS[stage] / ("checkpoints" if stage in TRAINED else "layers.yaml")


def undisturbed(runner: Runner, run: Path) -> dict[str, float]:
    """Every stage in order; seconds from the beginning of each one's work to its end."""
    seconds = {}
    for stage in FOLDERS:
        process = runner.start(stage, run)
        while not living(run, stage).exists() and not runner.ended(process):
            time.sleep(0.001)
        began = time.monotonic()
        status = runner.wait(process)
        if status:
            raise SystemExit(
                f"{stage}, undisturbed, ended with {status}:\n{(run / f'{stage}.log').read_text()[-3000:]}"
            )
        seconds[stage] = time.monotonic() - began
        print(f"undisturbed: {stage}, {seconds[stage]:.1f} s", flush=True)
    return seconds


def disturb(runner: Runner, run: Path, stage: str, draw: random.Random, seconds: float, in_write: bool) -> str | None:
    """Start a stage and kill it; what was done, or None where it ended before."""
    process = runner.start(stage, run)
    if in_write:
        hit = runner.kill_in_write(process, run, stage, draw.randint(1, 4))
        runner.wait(process)
        return "in a checkpoint write" if hit else None
    if not _alive(runner, process, run, stage):
        runner.wait(process)
        return None
    after = draw.uniform(0, seconds)
    end = time.monotonic() + after
    killed = runner.kill_when(process, lambda: time.monotonic() >= end)
    runner.wait(process)
    return f"{after:.2f} s into its work" if killed else None


def _alive(runner: Runner, process: int, run: Path, stage: str) -> bool:
    while not living(run, stage).exists():
        if runner.ended(process):
            return False
        time.sleep(0.001)
    return True


def main() -> None:
    """Kill, finish, compare; the last line says how many were identical."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50, help="disturbed runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: the time)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "chaos")
    parser.add_argument("--workers", type=int, default=2, help="DataLoader processes (default: %(default)s)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else time.time_ns() % 2**31
    draw = random.Random(seed)
    shutil.rmtree(options.folder, ignore_errors=True)
    data = options.folder / "data"
    phantom = [
        sys.executable,
        "-m",
        "ctx_distill",
        "phantom",
        str(data),
        "--ct",
        "40",
        "--xray",
        "48",
        "--seed",
        "5",
    ]
    subprocess.run(phantom, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    runner = Runner(data, ROOT / "tests" / "conf" / "tiny.yaml", options.workers)
    reference = options.folder / "undisturbed"
    print(f"seed {seed}, {options.n} runs, {options.workers} worker processes", flush=True)
    seconds = undisturbed(runner, reference)
    wanted = {stage: fingerprints(reference, stage) for stage in FOLDERS}
    identical = kills = in_writes = 0
    for number in range(options.n):
        stage = (
            TRAINED[number % len(TRAINED)] if number % 8 < 6 else draw.choice([s for s in FOLDERS if s not in TRAINED])
        )
        run = with_upstream(reference, stage, options.folder / f"run-{number:03d}")
        done: list[str] = []
        for _ in range(draw.randint(1, 3)):
            in_write = stage in TRAINED and (kills % 3 == 0)
            for _ in range(TRIES):
                how = disturb(runner, run, stage, draw, seconds[stage], in_write)
                if how is not None:
                    break
                shutil.rmtree(run)
                with_upstream(reference, stage, run)
                done.clear()
            else:
                raise SystemExit(f"{stage} ended {TRIES} times before it could be killed")
            kills, in_writes = kills + 1, in_writes + in_write
            done.append(how)
        runner.finish(stage, run)
        found = fingerprints(run, stage)
        differing = sorted(
            name for name in wanted[stage].keys() | found.keys() if wanted[stage].get(name) != found.get(name)
        )
        identical += not differing
        verdict = f"DIFFERS in {', '.join(differing)}; kept in {run}" if differing else "identical"
        print(f"{number + 1:>4} {stage:<11} killed {'; '.join(done)}: {verdict}", flush=True)
        if not differing:
            shutil.rmtree(run)
    runner.close()
    print(f"{kills} kills, {in_writes} of them inside a checkpoint write")
    print(f"{identical} of {options.n} identical")
    sys.exit(identical != options.n)


if __name__ == "__main__":
    main()

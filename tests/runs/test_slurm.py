"""The job scripts that `ctx-distill submit` writes, and what it does with sbatch."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ctx_distill.commands.main import main
from ctx_distill.errors import InputError
from ctx_distill.runs.slurm import JobOptions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH, for a fake sbatch."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def fake(path: Path, text: str) -> None:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)


def asked(cohort: Path, run: Path, tiny: Path, *more: str) -> list[str]:
    given = {"--data": cohort, "--run": run, "--preset": tiny}
    return [word for name, value in given.items() if name not in more for word in (name, str(value))] + list(more)


def script(run: Path, name: str) -> str:
    text = (run / "slurm" / f"{name}.sbatch").read_text()
    assert "@@" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    return text


def sbatch_lines(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def steps(text: str) -> list[list[str]]:
    """The arguments of every step, as the shell splits them."""
    return [shlex.split(line)[1:] for line in text.splitlines() if re.match(r"step [a-z]", line)]


def test_a_gpu_job(cohort: Path, tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--nodes", "4", "--gpus", "8", "--cpus", "12", "--time", "2-00:00:00", "--dry-run",
            "--sbatch=--partition=gpu -A lab --comment='two words'", "--trainer.max_epochs=3"]  # fmt: skip
    assert main(["submit", "distill", *asked(cohort, tmp_path / "run", tiny_preset, *more)]) == 0
    text = script(tmp_path / "run", "distill")
    lines = sbatch_lines(text)
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gres=gpu:8", "--cpus-per-task=12", "--time=2-00:00:00", "--requeue",
                 "--signal=USR1@90", "--open-mode=append", "--kill-on-invalid-dep=yes", "--partition=gpu", "-A lab",
                 '"--comment=two words"'):  # fmt: skip
        assert line in lines
    assert "srun --kill-on-bad-exit=1" in text
    assert "HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1" in text
    assert "CUDA_VISIBLE_DEVICES" not in text
    assert steps(text) == [["distill", *asked(cohort, tmp_path / "run", tiny_preset), "--trainer.max_epochs=3"]]
    assert "not submitted" in capsys.readouterr().out


def test_a_cpu_job(cohort: Path, tiny_preset: Path, tmp_path: Path) -> None:
    more = ["--nodes", "2", "--gpus", "0", "--tasks", "3", "--dry-run"]
    assert main(["submit", "heads", *asked(cohort, tmp_path / "run", tiny_preset, *more)]) == 0
    text = script(tmp_path / "run", "heads")
    assert "--ntasks-per-node=3" in sbatch_lines(text)
    assert not any("gres" in line for line in sbatch_lines(text))
    assert "export CUDA_VISIBLE_DEVICES=\n" in text
    assert [step[0] for step in steps(text)] == ["zero-shot", "classifier", "report"]


def test_arguments_and_paths_with_spaces_and_quotes_arrive_whole(
    cohort: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    run, odd = tmp_path / "a run's folder", '--trainer.profiler=it\'s $HOME `id` "x" * 50 %'
    assert main(["submit", "align", *asked(cohort, run, tiny_preset, odd, "--gpus", "0", "--dry-run")]) == 0
    text = script(run, "align")
    # The shell itself splits the line: what the program would be given.
    line = next(line for line in text.splitlines() if line.startswith("step align"))
    given = subprocess.run(
        ["bash", "-c", f"step() {{ printf '%s\\0' \"$@\"; }}\n{line}"], capture_output=True, check=True
    )
    assert given.stdout.decode().split("\0")[:-1] == ["align", *asked(cohort, run, tiny_preset), odd]
    assert f'--output="{run}/slurm/align-%j.out"' in sbatch_lines(text)


def test_the_chain(
    cohort: Path, tiny_preset: Path, tmp_path: Path, tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fake(tools / "sbatch", f'printf "%s|" "$@" >>{tmp_path}/calls; echo >>{tmp_path}/calls\n'
                           f'echo "$((100 + $(wc -l <{tmp_path}/calls)));cluster"\n')  # fmt: skip
    more = [
        "--parts",
        "5",
        "--sbatch=--partition=gpu",
        "--sbatch-prepare=--partition=cpu",
        "--distill.trainer.max_epochs=7",
    ]
    assert main(["submit", "all", *asked(cohort, run, tiny_preset, *more)]) == 0
    calls = [line.split("|")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    scripts = [Path(call[-1]).stem for call in calls]
    assert scripts == ["prepare", "expert", "index", "distill", "align", "heads"]
    after = {
        name: [word for word in call if word.startswith("--dependency")]
        for name, call in zip(scripts, calls, strict=True)
    }
    # numbers as the fake gives them: prepare 101, expert 102, ...
    assert after == {"prepare": [], "expert": [], "index": ["--dependency=afterok:102"],
                     "distill": ["--dependency=afterok:101:103"], "align": ["--dependency=afterok:104"],
                     "heads": ["--dependency=afterok:105"]}  # fmt: skip
    assert "distill: job 104" in capsys.readouterr().out
    prepare = sbatch_lines(script(run, "prepare"))
    assert "--array=0-4" in prepare
    assert "--partition=cpu" in prepare
    assert "--partition=gpu" not in prepare
    assert not any("gres" in line for line in prepare)
    read = f"--data.init_args.prepared={run}/prepared"
    assert {name: read in " ".join(steps(script(run, name))[0]) for name in scripts[1:]} == {
        "expert": False, "index": False, "distill": True, "align": True, "heads": True,
    }  # fmt: skip
    assert steps(script(run, "prepare"))[0][:3] == ["prepare", str(cohort / "ct.csv"), str(run / "prepared")]


def test_an_expert_that_is_given_is_not_trained_and_nothing_is_prepared_on_request(
    cohort: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ["--expert", "hf-hub:org/name", "--parts", "0", "--dry-run"]
    assert main(["submit", "all", *asked(cohort, run, tiny_preset, *more)]) == 0
    assert {path.stem for path in (run / "slurm").glob("*.sbatch")} == {"index", "distill", "align", "heads"}
    assert steps(script(run, "index"))[0][-2:] == ["--expert", "hf-hub:org/name"]
    assert "prepared=" not in script(run, "align")
    assert "dependency" not in (run / "slurm" / "submit-all.sh").read_text().splitlines()[3]


def test_without_slurm_the_script_is_written_and_the_error_says_how_to_submit_it(
    cohort: Path, tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "index", *asked(cohort, tmp_path / "run", tiny_preset)]) == 2
    told = capsys.readouterr().err
    assert "no `sbatch`" in told
    assert f"bash {tmp_path}/run/slurm/submit-index.sh" in told
    assert (tmp_path / "run" / "slurm" / "index.sbatch").is_file()


def test_what_sbatch_says_against_a_job_is_told_with_the_jobs_before(
    cohort: Path, tiny_preset: Path, tmp_path: Path, tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(tools / "sbatch", '[[ "$*" == *index.sbatch ]] && { echo "invalid account" >&2; exit 1; }\necho 55\n')
    assert main(["submit", "all", *asked(cohort, tmp_path / "run", tiny_preset)]) == 2
    told = capsys.readouterr().err
    assert "invalid account" in told
    assert "prepare: job 55; expert: job 55" in told


def test_the_submitting_shells_own_job_does_not_reach_sbatch(
    cohort: Path, tiny_preset: Path, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tools / "sbatch", f"env >{tmp_path}/env\necho 1\n")
    for name in ("SLURM_NTASKS", "SLURM_CONF", "SRUN_CPUS_PER_TASK", "MAKEFLAGS", "KEPT"):
        monkeypatch.setenv(name, "1")
    assert main(["submit", "index", *asked(cohort, tmp_path / "run", tiny_preset)]) == 0
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert {"SLURM_CONF", "KEPT"} <= names
    assert not names & {"SLURM_NTASKS", "SRUN_CPUS_PER_TASK", "MAKEFLAGS"}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--gpus", "2", "--tasks", "3"], "one process drives one GPU"),
        (["--nodes", "0"], "--nodes 0: expected 1 or more"),
        (["--sbatch=partition"], "is no option"),
        (["--sbatch=--comment='open"], "No closing quotation"),
        (["--force"], "start from the beginning"),
        (["--preset", "nowhere"], "no such configuration layer"),
        (["--data", "nowhere"], "holds no ct.csv"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_queued(
    cohort: Path, tiny_preset: Path, tmp_path: Path, more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "distill", *asked(cohort, tmp_path / "run", tiny_preset, *more), "--dry-run"]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "slurm").exists()


def test_options_have_the_commands_defaults() -> None:
    with pytest.raises(InputError, match="--parts -1: expected 0 or more"):
        JobOptions(parts=-1)
    assert JobOptions(gpus=0, tasks=3).tasks_per_node == 3


def test_submitting_imports_nothing_heavy(cohort: Path, tiny_preset: Path, tmp_path: Path) -> None:
    code = ("import sys; from ctx_distill.commands.main import main; main(sys.argv[1:]); "
            "print('loaded', sorted({'torch', 'lightning', 'pandas', 'numpy', 'monai'} & set(sys.modules)))")  # fmt: skip
    command = [sys.executable, "-c", code, "submit", "all", *asked(cohort, tmp_path / "run", tiny_preset, "--dry-run")]
    assert "loaded []" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "target", ["slurm-stage-1", "slurm-stage-2", "slurm-stage-3", "slurm-stage-4", "slurm-expert", "slurm-prepare"]
)
def test_make_hands_its_variables_on(target: str, cohort: Path, tiny_preset: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    variables = {"DATA": cohort, "RUN": run, "PRESET": tiny_preset, "GPUS": 0, "TASKS": 2, "DRY": 1, "PARTS": 3,
                 "SBATCH": "--partition=gpu --comment='a $b'", "SETUP": 'echo "$HOME" \'$(pwd)\'',
                 "ARGS": "--trainer.max_epochs=2 '--trainer.profiler=a b'"}  # fmt: skip
    command = ["make", "-C", str(ROOT), target, *(f"{name}={value}" for name, value in variables.items())]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (name,) = {path.stem for path in (run / "slurm").glob("*.sbatch")}
    text = script(run, name)
    assert '"--comment=a $b"' in sbatch_lines(text)
    assert "\n  echo \"$HOME\" '$(pwd)'\n" in text
    if target != "slurm-prepare":
        assert "--ntasks-per-node=2" in sbatch_lines(text)
        assert steps(text)[0][-2:] == ["--trainer.max_epochs=2", "--trainer.profiler=a b"]

"""Overrides are checked at once, by names and choices read from source."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ctx_distill.errors import InputError
from ctx_distill.runs.overrides import Override, check_overrides, split_overrides
from ctx_distill.runs.stage_table import STAGES

MODEL = "--model.init_args"
ENCODER = "ctx_distill.models.ct_encoder.ViT3D"


def check(*arguments: str, stages: tuple[str, ...] = ("align",)) -> None:
    check_overrides([STAGES[name] for name in stages], "demo", list(arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        (f"{MODEL}.robust.mode=soft",),
        ("--model.robust.mode", "soft"),
        (f"{MODEL}.robust={{mode: soft, evidence: [report]}}",),
        (f"{MODEL}.robust.evidence=[report, ema]",),
        (f"{MODEL}.robust.evidence+=ema",),
        (f"{MODEL}.chunk=null", f"{MODEL}.chunk=16", f"{MODEL}.cache_gb=1e-3", f"{MODEL}.warmup=0"),
        (f"{MODEL}.optimizer.init_args.lr=1e-3", "--model.optimizer.lr=1e-3"),
        (f"{MODEL}.optimizer=SGD", f"{MODEL}.optimizer.init_args.momentum=0.9"),
        (f"{MODEL}.encoder=ViT3D", f"{MODEL}.encoder.variant=vit_b", f"{MODEL}.encoder.init_args.dropout=0.1"),
        (f"{MODEL}.encoder={{class_path: {ENCODER}, init_args: {{variant: vit_b}}}}",),
        (
            "--trainer.max_epochs=3",
            "--trainer.max_steps",
            "-1",
            "--trainer.precision=bf16-mixed",
            "--trainer.devices=2",
        ),
        ("--trainer.precision=32", "--trainer.limit_train_batches=0.5", "--trainer.logger=false"),
        ("--trainer.callbacks+=package.Callback", "--trainer.logger.init_args.save_dir=folder"),
        ("--data.init_args.volume.spacing=[1, 1, 1]", "--data.batch_size=3", "--data.init_args.seed=null"),
        ("--seed_everything=3", "--print_config", "--config", "layer.yaml"),
        ("--model=package.Task", "--model.init_args.anything=1"),
    ],
)
def test_what_jsonargparse_accepts_passes(arguments: tuple[str, ...]) -> None:
    check(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (f"{MODEL}.robust.mode=masked",),
            r"mode is 'masked'; choose from: relabel, mask, soft \(did you mean 'mask'\?\)",
        ),
        (("--model.robust.mode", "masked"), "choose from: relabel, mask, soft"),
        ((f"{MODEL}.robust={{mode: masked}}",), "mode is 'masked'; choose from: relabel, mask, soft"),
        ((f"{MODEL}.robust={{mod: mask}}",), "no setting model.init_args.robust.mod. Did you mean --.*robust.mode"),
        ((f"{MODEL}.robust.mod=mask",), "no such setting. Did you mean --model.init_args.robust.mode"),
        ((f"{MODEL}.mode=mask",), "Did you mean --model.init_args.robust.mode"),
        ((f"{MODEL}.robust.evidence=[finding]",), r"evidence is 'finding'; choose from: .*did you mean 'findings'"),
        (("--trainer.max_epoch=3",), "no such setting. Did you mean --trainer.max_epochs"),
        (("--trainer.max_epochs=three",), "max_epochs is 'three'; expected int or null"),
        (("--trainer.precision=bf16-mixd",), "did you mean 'bf16-mixed'"),
        (("--trainer={max_epoch: 3}",), "no setting trainer.max_epoch"),
        (("--data.init_args.batch_size=1.5",), "batch_size is '1.5'; expected int"),
        ((f"{MODEL}.text.trainable=maybe",), "trainable is 'maybe'; expected bool"),
        ((f"{MODEL}.warmup=fast",), "warmup is 'fast'; expected float"),
        ((f"{MODEL}.optimizer.init_args.lrate=1",), "no such setting"),
        ((f"{MODEL}.encoder=ViT3D", f"{MODEL}.encoder.variant=vit_x"), "choose from: small, vit_s, vit_b"),
        ((f"{MODEL}.survival.back_off=0.5",), "survival.back_off was removed"),
        (("--trainer.max_epochs",), "has no value; expected --trainer.max_epochs=VALUE"),
        (("3",), "unexpected argument '3'"),
        (("--xyz.max_epochs=3",), "unknown name 'xyz'; expected model, data or trainer, or a stage"),
    ],
)
def test_what_a_stage_does_not_have_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        check(*arguments)
    assert "\n" not in str(error.value)


def test_a_stage_prefix_addresses_one_stage() -> None:
    both = ("expert", "distill")
    check("--distill.model.init_args.tau=0.1", "--trainer.max_epochs", "2", stages=both)
    with pytest.raises(InputError, match=r"expert has no such setting, .*: --distill.model.init_args.tau"):
        check("--model.init_args.tau=0.1", stages=both)
    with pytest.raises(InputError, match=r"unknown name 'distil'.*Did you mean --distill.trainer.max_epochs"):
        check("--distil.trainer.max_epochs=2", stages=both)
    with pytest.raises(InputError, match=r"stage distill has no such setting. Did you mean --model.init_args.tau\?"):
        check("--distill.model.init_args.taus=0.1", stages=both)


def test_both_forms_of_an_override_are_split() -> None:
    assert list(split_overrides(["--a.b=1", "--c", "-1", "--d", "--e=x=y"])) == [
        Override("a.b", "1"), Override("c", "-1"), Override("d", None), Override("e", "x=y"),
    ]  # fmt: skip


def test_a_bad_override_is_answered_without_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom ctx_distill.commands.main import main\n"
        "status = main(['align', '--model.init_args.robust.mode=masked'])\n"
        "print(status, sorted({'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "2 []"
    assert done.stderr.strip() == (
        "ctx-distill align: --model.init_args.robust.mode: mode is 'masked'; choose from: relabel, mask, soft"
        " (did you mean 'mask'?)"
    )

"""`ctx-distill`: one entry point. Nothing heavy is imported before a command is known, so that help is there at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ctx_distill import signals
from ctx_distill.arguments import HEADS, build_parser
from ctx_distill.errors import InputError
from ctx_distill.pipeline.plan import STAGES, Stage


def _part_overrides(given: list[str]) -> tuple[list[str], list[str]]:
    """Take the overrides out of `zero-shot`'s arguments, `--trainer.devices 2` as `--trainer.devices=2`.

    argparse would take the value of the one, and the whole of another that has a space in it, for CHECKPOINT.
    """
    own = {"--protocol", "--vocabulary", "--templates", "--split", "--out", "--data", "--run", "--preset", "--expert"}
    own |= {"--no-synonyms", "--force", "--help"}
    kept: list[str] = []
    overrides: list[str] = []
    waits = False
    for argument in given:
        if argument.startswith("--") and argument.partition("=")[0] not in own:
            overrides.append(argument)
            waits = "=" not in argument
        elif waits and not argument.startswith("-"):
            overrides[-1] += f"={argument}"
            waits = False
        else:
            kept.append(argument)
            waits = False
    return kept, overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0 done, 1 `check` found errors, 2 bad input, 75 stopped by a signal and to be run again, 130 interrupted.
    """
    with signals.listening():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    asked, held = _part_overrides(given) if given[:1] == ["zero-shot"] else (given, [])
    options, overrides = parser.parse_known_args(asked)
    overrides += held
    if overrides and not hasattr(options, "preset"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        return _dispatch(options, overrides, given)
    except InputError as error:
        print(f"ctx-distill {options.command}: {error}", file=sys.stderr)
        return 2
    except signals.StopRequested as stop:
        from ctx_distill.pipeline.run_folder import is_first_process

        if not is_first_process():
            return 0  # of several processes the first one speaks for the job
        print(f"stopped ({stop}); the same command goes on from here", file=sys.stderr)
        return signals.STOPPED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _dispatch(options: argparse.Namespace, overrides: list[str], given: list[str]) -> int:
    if options.command == "phantom":
        from ctx_distill.phantom.cohort import write_cohort

        write_cohort(options.out, options.ct, options.xray, options.seed, options.workers)
    elif options.command == "manifest":
        _manifest(options)
    elif options.command == "merge":
        from ctx_distill.sources.merge import merge_manifests

        print(merge_manifests(options.manifests, options.out))
    elif options.command == "check":
        from ctx_distill.pipeline.check import check_manifest

        told, errors = check_manifest(options.manifest, options.out, options.prepared, options.workers)
        print(told)
        return 1 if errors else 0
    elif options.command == "prepare":
        from ctx_distill.pipeline.prepare import prepare_manifest

        print(prepare_manifest(options.manifest, options.out, options.volume_preset, options.workers, options.array))
    elif options.command == "page":
        from ctx_distill.page.page import build_page

        print(build_page(options.run))
    elif options.command == "compare":
        from ctx_distill.page.compare import build_compare_page

        print(build_compare_page(options.runs, options.out))
    elif options.command == "submit":
        _submit(options, overrides)
    elif options.command == "ablation":
        _ablation(options)
    elif options.command == "findings":
        from ctx_distill.pipeline.findings import write_findings

        asked = (options.vocabulary, options.prefix, options.sides, options.workers)
        print(write_findings(options.source, options.out, *asked))
    elif options.command == "predict":
        from ctx_distill.inference.batch import predict_scans

        told, unreadable = predict_scans(
            options.checkpoint, options.given, options.out, options.saliency, options.report, options.device,
            options.vocabulary, options.workers,
        )  # fmt: skip
        print(told)
        return 1 if unreadable else 0
    elif options.command == "export":
        _export(options)
    elif options.command == "probe":
        from ctx_distill.inference.probing import probe

        out = options.out or options.checkpoint / "probe"
        print(probe(options.checkpoint, options.manifest, out, options.shots, options.seeds, options.device))
    elif options.command == "serve":
        _serve(options)
    elif options.command == "weights":
        _weights(options)
    elif options.command == "zero-shot" and _asks_checkpoint(options):
        _zero_shot(options, overrides)
    else:
        _run(options, overrides, given)
    return 0


def _manifest(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from ctx_distill.sources.build import build_manifest
    from ctx_distill.sources.options import SourceOptions

    asked = SourceOptions(**{field.name: getattr(options, field.name) for field in fields(SourceOptions)})
    print(build_manifest(options.source, options.root, options.out, asked))


def _ablation(options: argparse.Namespace) -> None:
    from ctx_distill.ablation.driver import Options, run_ablation
    from ctx_distill.pipeline.run_folder import lock_run

    asked = Options(
        options.data, options.run, options.preset, options.record or options.run, tuple(options.arms.split()),
        tuple(options.regimes.split()), options.seeds, options.workers, options.again, options.report, options.plan,
    )  # fmt: skip
    with lock_run(options.run, "ctx-distill ablation"):
        print(run_ablation(asked))


def _submit(options: argparse.Namespace, overrides: list[str]) -> None:
    from dataclasses import fields

    from ctx_distill.pipeline.slurm import JobOptions, RunOptions, submit

    asked = JobOptions(**{field.name: getattr(options, field.name) for field in fields(JobOptions)})
    run = RunOptions(options.data, options.run, options.preset, options.expert_source, overrides)
    print(submit(options.target, run, asked, options.dry_run))


def _serve(options: argparse.Namespace) -> None:
    from ctx_distill.explorer.limits import Limits
    from ctx_distill.explorer.reader import ReaderSettings, open_reader
    from ctx_distill.explorer.server import Address, serve

    settings = ReaderSettings(
        options.checkpoint, options.index, options.show_reports, options.vocabulary, options.neighbours, options.device
    )
    limits = Limits(
        options.max_upload, options.max_unpacked, options.max_files, options.max_seconds, options.idle_minutes,
        options.max_sessions, options.max_display,
    )  # fmt: skip
    serve(open_reader, settings, limits, Address(options.host, options.port, options.allow_host))


def _export(options: argparse.Namespace) -> None:
    from ctx_distill.inference.export import export_model, push_to_hub
    from ctx_distill.inference.licences import CardFacts

    given = {name: getattr(options, name) for name in ("name", "license", "data_license")}
    facts = CardFacts(**{name: value for name, value in given.items() if value is not None})
    told = export_model(options.checkpoint, options.out, facts)
    for name, difference in told["largest_difference"].items():
        print(f"{name}: largest difference from the model {difference:.2g}")
    for name, reason in told["not_exported"].items():
        print(f"{name}: not exported ({reason})")
    print(options.out)
    if options.push:
        print(push_to_hub(options.out, options.push, accept_unknown_licences=options.accept_unknown_licences))


def _weights(options: argparse.Namespace) -> None:
    from ctx_distill.models import weights

    if options.action == "fetch":
        weights.fetch(options.source, options.revision, options.out)
    else:
        checked = {"sha256": options.sha256} if options.sha256 else {}
        print(weights.convert_torchxrayvision(options.checkpoint, options.out, **checked))


def _asks_checkpoint(options: argparse.Namespace) -> bool:
    """Which of the two forms of `zero-shot` is meant.

    Raises:
        InputError: options of the other form are given, which would change nothing.
    """
    asks = options.checkpoint is not None
    theirs: dict[str, object] = {
        "protocol": None,
        "vocabulary": None,
        "templates": "normal",
        "no_synonyms": False,
        "split": "test",
        "out": None,
    }
    if asks:
        theirs = {
            "data": Path("runs/demo/data"),
            "run": Path("runs/demo"),
            "preset": "demo",
            "expert_source": None,
            "force": False,
        }
    wrong = [name for name, default in theirs.items() if getattr(options, name) != default]
    if wrong:
        flags = ", ".join(f"--{name.replace('_source', '').replace('_', '-')}" for name in wrong)
        remedy = "leave it out" if asks else "give both, or --model.init_args.<name>=<value> to the stage"
        raise InputError(
            f"{flags}: given {'with' if asks else 'without'} CHECKPOINT MANIFEST, where it says nothing: {remedy}."
        )
    return asks


def _zero_shot(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.manifest is None:
        raise InputError(f"{options.checkpoint}: given without a MANIFEST; expected CHECKPOINT MANIFEST: give both.")
    from ctx_distill.pipeline.zero_shot import Asked, evaluate

    asked = Asked(
        options.checkpoint, options.manifest, options.out, options.protocol, options.vocabulary, options.templates,
        options.split, not options.no_synonyms,
    )  # fmt: skip
    print(evaluate(asked, overrides))


def _run(options: argparse.Namespace, overrides: list[str], given: list[str]) -> None:
    from ctx_distill.pipeline.all_stages import run_stages
    from ctx_distill.pipeline.run_folder import lock_run

    stages: list[Stage]
    if options.command == "all":
        stages = [stage for stage in STAGES.values() if stage.name != "expert" or not options.expert_source]
    elif options.command == "heads":
        stages = [STAGES[name] for name in HEADS]
    else:
        stages = [STAGES[options.command]]
    with lock_run(options.run, "ctx-distill " + " ".join(given)):
        run_stages(stages, options, overrides)


if __name__ == "__main__":
    sys.exit(main())

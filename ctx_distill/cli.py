"""`ctx-distill`: one entry point. Nothing heavy is imported before a command is known, so that help is there at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ctx_distill import __version__, signals
from ctx_distill.errors import InputError
from ctx_distill.pipeline.plan import STAGES, Stage

NOTICE = "A research tool, not a medical device."
SOURCES = ("ct-rate", "rad-chestct", "mimic-cxr", "chexpert-plus", "padchest", "open-i", "dicom")
PROTOCOLS = ("ct-rate-18", "fvlm-16")
HEADS = ("zero-shot", "classifier", "report")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="ctx-distill",
        allow_abbrev=False,
        description=f"Chest-CT understanding distilled from chest-X-ray experts. {NOTICE}",
    )
    parser.add_argument("--version", action="version", version=f"ctx-distill {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    for stage in STAGES.values():
        number = f" (stage {stage.number})" if stage.number else ""
        parser_of_stage = commands.add_parser(stage.name, help=f"run one stage: {stage.title}{number}")
        _add_run_options(parser_of_stage)
        if stage.name == "zero-shot":
            _add_zero_shot(parser_of_stage)
    _add_run_options(commands.add_parser("heads", help="stage 4 as a whole: " + ", ".join(HEADS)))
    everything = commands.add_parser("all", help="every stage in order, skipping what is complete, then the page")
    _add_run_options(everything)
    everything.add_argument("--isolated", action="store_true", help="run each stage in a process of its own")
    page = commands.add_parser("page", help="write RUN/index.html from what a run folder holds")
    page.add_argument("--run", type=Path, default=Path("runs/demo"), metavar="RUN")
    phantom = commands.add_parser("phantom", help="write the embedded cohort: synthetic chests with known findings")
    phantom.add_argument("out", type=Path, metavar="OUT")
    phantom.add_argument("--ct", type=int, default=480, metavar="N", help="CT studies (default: %(default)s)")
    phantom.add_argument("--xray", type=int, default=1000, metavar="M", help="X-ray studies (default: %(default)s)")
    phantom.add_argument(
        "--seed", type=int, default=0, metavar="S", help="same seed, same bytes (default: %(default)s)"
    )
    phantom.add_argument("--workers", type=int, default=None, metavar="W", help="processes (default: one a core)")
    _add_manifest(
        commands.add_parser("manifest", help="write the manifest of a public data set, or of a folder of DICOM")
    )
    merge = commands.add_parser("merge", help="write one manifest of several, to train on several data sets")
    merge.add_argument("out", type=Path, metavar="OUT")
    merge.add_argument("manifests", type=Path, nargs="+", metavar="MANIFEST")
    _add_check(commands.add_parser("check", help="read every image of a manifest and say what is wrong with it"))
    _add_prepare(commands.add_parser("prepare", help="write a manifest's volumes once in the form that training reads"))
    _add_submit(
        commands.add_parser("submit", help="write the SLURM job of a stage, or of the whole chain, and submit it")
    )
    _add_ablation(
        commands.add_parser("ablation", help="compare the parts of the method on one cohort, with paired seeds")
    )
    _add_findings(commands.add_parser("findings", help="read the findings of a table of reports into columns"))
    _add_predict(commands.add_parser("predict", help="findings, embedding, saliency and draft report of scans"))
    _add_export(commands.add_parser("export", help="a model to give away: safetensors, card, torch.export, checked"))
    _add_probe(commands.add_parser("probe", help="linear probe on features computed once, and few-shot curves"))
    _add_weights(commands.add_parser("weights", help="fetch or convert the weights of an X-ray expert"))
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    parser.add_argument("--force", action="store_true", help="run again although it is complete")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"), metavar="DATA",
                        help="folder holding ct.csv and xray.csv (default: %(default)s)")  # fmt: skip
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), metavar="RUN",
                        help="run folder (default: %(default)s)")  # fmt: skip
    parser.add_argument("--preset", default="demo", metavar="PRESET",
                        help="demo, base, large, or a YAML file (default: %(default)s)")  # fmt: skip
    parser.add_argument("--expert", default=None, metavar="SOURCE", dest="expert_source",
                        help="an X-ray expert's folder or hf-hub:org/name; default: the run's own")  # fmt: skip
    parser.epilog = "Any other option is a LightningCLI override, such as --trainer.max_epochs=5."


def _add_zero_shot(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [CHECKPOINT MANIFEST] [options]"
    parser.description = (
        "With CHECKPOINT MANIFEST: ask a finished model about any manifest, score and compare (docs/zero_shot.md). Without "
        "them: run the stage on DATA in RUN."
    )
    group = parser.add_argument_group("with CHECKPOINT MANIFEST")
    add = group.add_argument
    add("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="run folder, or folder of a stage-3 artefact")
    add("manifest", type=Path, nargs="?", metavar="MANIFEST", help="CSV or Parquet of CTs")
    add(
        "--protocol",
        choices=PROTOCOLS,
        default=None,
        help="findings of CT-RATE's protocol (default: the label columns)",
    )
    add("--vocabulary", default=None, metavar="NAME|YAML", help="findings and synonyms to ask for")
    add(
        "--templates",
        default="normal",
        metavar="NAME|YAML",
        help="default, ensemble, normal, or a file of prompt pairs",
    )
    add("--no-synonyms", action="store_true", help="ask with the findings' names alone")
    add("--split", choices=("train", "val", "test"), default="test", help="studies to score (default: %(default)s)")
    add("--out", type=Path, default=None, metavar="FOLDER", help="default: <manifest>.zero_shot beside it")


def _join_values(given: list[str]) -> list[str]:
    """`--trainer.devices 2` as `--trainer.devices=2`, so that the value of an override is not taken for CHECKPOINT."""
    own = {"--protocol", "--vocabulary", "--templates", "--split", "--out", "--data", "--run", "--preset", "--expert"}
    flags = {"--no-synonyms", "--force"}
    joined: list[str] = []
    for argument in given:
        last = joined[-1] if joined else ""
        waits = last.startswith("-") and "=" not in last and last not in own | flags and last not in ("-h", "--help")
        if waits and not (argument.startswith("--") or argument == "-h"):
            joined[-1] = f"{last}={argument}"
        else:
            joined.append(argument)
    return joined


def _add_manifest(parser: argparse.ArgumentParser) -> None:
    # The names stand here again, since importing the builders takes a second; a test compares them.
    parser.add_argument("source", choices=SOURCES, metavar="SOURCE", help=", ".join(SOURCES))
    parser.add_argument("root", type=Path, metavar="ROOT", help="the data set's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the manifest to write, such as ROOT/ct.csv")
    add = parser.add_argument
    add("--release", choices=("first", "fixed"), default=None, help="ct-rate (default: looks which is there)")
    add("--reconstructions", choices=("one", "all"), default="one", help="ct-rate, dicom: of a study (default: one)")
    add("--labels", choices=("hlip", "radfinder", "own"), default="hlip", help="rad-chestct: its map of labels")
    add("--english-from-labels", action="store_true", help="padchest: English sentences made from its labels")
    add("--first-is-frontal", action="store_true", help="open-i: guess views by the order of the films")
    add("--reports", type=Path, default=None, metavar="PATH", help="dicom: CSV of reports; mimic-cxr: folder of them")
    add(
        "--key",
        type=Path,
        default=None,
        metavar="FILE",
        help="dicom: secret for ids (default: ~/.config/ctx-distill/key)",
    )
    add("--keep-ids", action="store_true", help="dicom: ids and dates as in the headers")
    add("--keep-paths", action="store_true", help="dicom: although paths name patients")
    add(
        "--convert",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="dicom: write the scans there as NIfTI, hashed names",
    )
    add(
        "--val",
        type=float,
        default=0.1,
        metavar="X",
        help="share of patients, where the set has no split (default: .1)",
    )
    add("--test", type=float, default=0.1, metavar="X", help="likewise (default: .1)")
    add("--workers", type=int, default=None, metavar="W", help="processes (default: one a core)")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER",
                        help="table, page and list (default: <manifest>.check beside it)")  # fmt: skip
    parser.add_argument("--prepared", type=Path, default=None, metavar="FOLDER",
                        help="also compare the checksums of what `prepare` wrote there")  # fmt: skip
    parser.add_argument("--workers", type=int, default=None, metavar="W", help="processes (default: one a core)")
    parser.epilog = "Exit status: 0 without errors, 1 with errors (warnings and notes are none), 2 for bad input."


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--preset", default="demo", metavar="PRESET", dest="volume_preset",
                        help="whose volumes: demo, base, large, a YAML file, ct-clip, fvlm, hlip, merlin (default: %(default)s)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=None, metavar="W", help="processes (default: one a core)")
    parser.add_argument("--array", default=None, metavar="i/n",
                        help="every n-th image from the i-th, from 0 (default: this task of a SLURM array, else all)")  # fmt: skip


def _add_submit(parser: argparse.ArgumentParser) -> None:
    targets = [*STAGES, "heads", "prepare", "all"]
    parser.add_argument("target", choices=targets, metavar="TARGET", help=", ".join(targets))
    _add_inputs(parser)
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="machines a job (default: %(default)s)")
    add("--gpus", type=int, default=1, metavar="N", help="GPUs a machine; 0 for CPU jobs (default: %(default)s)")
    add("--tasks", type=int, default=None, metavar="N", help="processes a machine of CPU jobs (default: 1)")
    add("--cpus", type=int, default=None, metavar="N", help="cores a process (default: the cluster's)")
    add("--time", default="", metavar="LIMIT", help="time limit as sbatch takes it (default: the partition's)")
    add("--sbatch", default="", metavar="OPTIONS", help="more options of sbatch: '--partition=gpu --account=lab'")
    add("--sbatch-prepare", default=None, metavar="OPTIONS", help="those of the preparing jobs in their place")
    add("--setup", default="", metavar="LINES", help="shell lines run first in the job: modules, a container")
    add("--parts", type=int, default=8, metavar="N", help="jobs of the preparing array; 0: none (default: %(default)s)")
    add("--prepared", type=Path, default=None, metavar="FOLDER", help="of prepared volumes (default: RUN/prepared)")
    add("--dry-run", action="store_true", help="write and show the scripts only")


def _add_ablation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("runs/ablation/data"), metavar="DATA",
                        help="the cohort's folder (default: %(default)s)")  # fmt: skip
    parser.add_argument("--run", type=Path, default=Path("runs/ablation"), metavar="RUN",
                        help="where the runs and the page go (default: %(default)s)")  # fmt: skip
    parser.add_argument("--preset", default="ablation", metavar="PRESET", help="sizes (default: %(default)s)")
    parser.add_argument("--record", type=Path, default=None, metavar="FOLDER",
                        help="folder of rows that stand already and are added to; default: RUN")  # fmt: skip
    parser.add_argument("--arms", default="", metavar='"NAME NAME"', help="arms of stages/ablation.yaml; default: all")
    parser.add_argument("--regimes", default="", metavar='"NAME NAME"', help="regimes of the same; default: all")
    parser.add_argument("--seeds", type=int, default=None, metavar="N", help="at most so many a regime; default: all")
    parser.add_argument("--workers", type=int, default=0, metavar="W", help="processes (default: one a core)")
    parser.add_argument("--plan", type=Path, default=None, metavar="FILE", help="default: stages/ablation.yaml")
    parser.add_argument("--again", action="store_true", help="run what stands in the table anew, and compare")
    parser.add_argument("--report", action="store_true", help="only write the tables and the page from the rows")


def _add_findings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="IN", help="CSV or Parquet: report_text, or findings and impression"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="IN with a column a finding: 1, 0, -1 (uncertain), blank")
    parser.add_argument("--vocabulary", default="ct-rate", metavar="NAME",
                        help="ct-rate, chexpert, phantom, or a YAML file (default: %(default)s)")  # fmt: skip
    parser.add_argument("--prefix", default="", metavar="TEXT", help="before the findings' names, such as 'label:'")
    parser.add_argument("--sides", action="store_true", help="also side:<finding>: left, right, both")
    parser.add_argument("--workers", type=int, default=None, metavar="W", help="processes (default: one a core)")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run folder, or artefact of stage 3 or 4")
    parser.add_argument("given", type=Path, metavar="SCANS", help="scan, folder of DICOM slices or of scans, manifest")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--saliency", nargs="*", default=None, metavar="FINDING",
                        help="maps of these findings as NIfTI; without names: of the three most probable of each scan")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="draft reports too")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--vocabulary", default=None, metavar="NAME",
                        help="zero-shot findings, where the run names none (default: ct-rate)")  # fmt: skip
    parser.epilog = (
        "Goes on where it stopped. Exit status: 0 all read, 1 some scans were unreadable, 2 for bad input. " + NOTICE
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run folder, or artefact of stage 3 or 4")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--name", default=None, metavar="NAME", help="of the model, for its card")
    parser.add_argument("--license", default=None, metavar="NAME", help="of the weights, as the hub names it")
    parser.add_argument("--data-license", default=None, metavar="TEXT", help="of the data that it was trained on")
    parser.add_argument("--push", default=None, metavar="ORG/NAME", help="upload it to the Hugging Face hub, private")


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run folder, or artefact of stage 3 or 4")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="with label columns")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: CHECKPOINT/probe")
    parser.add_argument("--shots", type=int, nargs="*", default=[], metavar="K",
                        help="also with K positives and K negatives a finding: 1 2 4 8 16")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="draws of them (default: %(default)s)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, ... (default: %(default)s)")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="<action>", required=True)
    fetch = actions.add_parser("fetch", help="download an expert at a pinned revision, for nodes without internet")
    fetch.add_argument("source", metavar="hf-hub:ORG/NAME")
    fetch.add_argument("--revision", required=True, metavar="COMMIT", help="40 hex digits")
    fetch.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    convert = actions.add_parser("convert-torchxrayvision", help="turn torchxrayvision's pickle into safetensors, once")
    convert.add_argument("checkpoint", type=Path, metavar="FILE.pt")
    convert.add_argument("out", type=Path, metavar="FOLDER")
    convert.add_argument("--sha256", default=None, metavar="HEX", help="of the file; default: the pinned release")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0 done, 1 `check` found errors, 2 bad input, 75 stopped by a signal and to be run again, 130 interrupted.
    """
    with signals.listening():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["zero-shot"]:
        given = _join_values(given)
    parser = build_parser()
    options, overrides = parser.parse_known_args(given)
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
            options.vocabulary,
        )  # fmt: skip
        print(told)
        return 1 if unreadable else 0
    elif options.command == "export":
        _export(options)
    elif options.command == "probe":
        from ctx_distill.inference.probing import probe

        out = options.out or options.checkpoint / "probe"
        print(probe(options.checkpoint, options.manifest, out, options.shots, options.seeds, options.device))
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


def _export(options: argparse.Namespace) -> None:
    from ctx_distill.inference.card import CardFacts
    from ctx_distill.inference.export import export_model, push_to_hub

    given = {name: getattr(options, name) for name in ("name", "license", "data_license")}
    facts = CardFacts(**{name: value for name, value in given.items() if value is not None})
    told = export_model(options.checkpoint, options.out, facts)
    for name, difference in told["largest_difference"].items():
        print(f"{name}: largest difference from the model {difference:.2g}")
    for name, reason in told["not_exported"].items():
        print(f"{name}: not exported ({reason})")
    print(options.out)
    if options.push:
        print(push_to_hub(options.out, options.push))


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

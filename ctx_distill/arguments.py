"""Commands and options of `ctx-distill`. Nothing heavy is imported here, so that help is there at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from ctx_distill import __version__
from ctx_distill.pipeline.plan import STAGES

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
    compare = commands.add_parser("compare", help="write one page about several runs, differences paired by patient")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders; the first is the base")
    compare.add_argument("--out", type=Path, default=Path("compare.html"), metavar="HTML", help="default: %(default)s")
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
    _add_serve(commands.add_parser("serve", help="the explorer: a local page where a scan is dropped and looked at"))
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


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a run folder, or a dual encoder's or classifier's artefact"
    )
    add(
        "--index",
        type=Path,
        default=None,
        metavar="INDEX",
        help="stage-1 artefact for the nearest X-rays (default: the run's)",
    )
    add("--show-reports", action="store_true", help="show reports and pictures of the index's pool too")
    add("--vocabulary", default=None, metavar="NAME", help="findings to ask for (default: the run's, else ct-rate)")
    add("--neighbours", type=int, default=6, metavar="K", help="X-rays shown (default: %(default)s)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default: %(default)s)")
    add(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: %(default)s, this machine alone)"
    )
    add("--port", type=int, default=8787, metavar="N", help="0: any free one (default: %(default)s)")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a further name by which it may be asked")
    add("--max-upload", type=float, default=1024, metavar="MB", help="of one upload (default: %(default)s)")
    add("--max-unpacked", type=float, default=2048, metavar="MB", help="of a scan's voxels (default: %(default)s)")
    add("--max-files", type=int, default=5000, metavar="N", help="in a zip (default: %(default)s)")
    add("--max-seconds", type=float, default=300, metavar="S", help="to receive, and to compute (default: %(default)s)")
    add("--max-sessions", type=int, default=4, metavar="N", help="at one time (default: %(default)s)")
    add("--max-display", type=float, default=80, metavar="M", help="million voxels drawn (default: %(default)s)")
    add("--idle-minutes", type=float, default=15, metavar="M", help="then a session ends (default: %(default)s)")
    parser.epilog = f"{NOTICE} Scans stay in a temporary folder and are deleted when their session ends."


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
    parser.add_argument("--workers", type=int, default=None, metavar="N",
                        help="processes (default: on a CPU one a core for every 16 scans, else 1)")  # fmt: skip
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
    parser.add_argument("--accept-unknown-licences", action="store_true",
                        help="push although nothing tells the licence of a part")  # fmt: skip


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run folder, or artefact of stage 3 or 4")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="with label columns")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: CHECKPOINT/probe")
    parser.add_argument("--shots", nargs="*", default=[], metavar="K",
                        help="also with K positives and K negatives a finding, or K%% of the training patients: 1 5 10 10%% 50%%")  # fmt: skip
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

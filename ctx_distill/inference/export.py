"""`ctx-distill export`: write a folder to share, if it gives the same results as the original."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctx_distill import __version__
from ctx_distill.checkpoint import WEIGHTS_FILE
from ctx_distill.data.transforms.projection import SIDE
from ctx_distill.errors import InputError
from ctx_distill.files import replace_folder, write_json, write_text
from ctx_distill.inference.card import model_card, read_record
from ctx_distill.inference.licences import CardFacts, licences, unknown_licences
from ctx_distill.inference.model import CTModel
from ctx_distill.inference.parts import USE_FILE, Parts, open_parts
from ctx_distill.inference.towers import ImageTower, ReportTower, export_module
from ctx_distill.run_files import ARTEFACT, RUN_FILE

LARGEST_DIFFERENCE = 1e-4
"""Tolerance between the original and an exported program, in float32, for values of the order of 1."""

CHECKED = 3  # volumes; another batch size than that of the export
TEXTS = ("No focal consolidation.", "A large left pleural effusion. " * 60, "Emphysema.")
"""The second is longer than the context length."""
IMAGE, PROJECTION = (
    "volume (B, 1, D, H, W), prepared",
    "projection (B, S, S), data.projection.square_projection of the scan",
)
TEXT = ("input_ids (C, L), of chunks", "attention_mask (C, L)", "share (B, C), of a chunk in a report")


def export_model(source: Path, out: Path, facts: CardFacts = CardFacts()) -> dict[str, Any]:
    """Write a model's weights (safetensors), card and torch.export programs, and compare them with the original.

    `ctx_distill.load` opens OUT, and `push_to_hub` uploads it.

    Args:
        source: run folder or artefact.
        out: folder to write; it must not hold anything else.
        facts: for the model card.

    Returns:
        The content of `export.json`: files, largest differences, and what could not be exported and why.

    Raises:
        InputError: there is no model, OUT holds something else, or the export gives other results than the original.
            OUT is then left unchanged.
    """
    if out.exists() and not (out / "export.json").is_file() and any(out.iterdir()):
        raise InputError(f"{out}: holds files that are not an export. Give a new folder.")
    model = CTModel(open_parts(source))
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_pretrained(model, place, facts)
        told = _export_towers(model, place)
        write_text(place / "README.md", model_card(model.parts, facts, told["programs"]))
        told["unknown_licences"] = unknown_licences(
            licences(model.parts, read_record(model.parts.source / RUN_FILE), facts)
        )
        told["version"], told["fingerprint"] = __version__, model.fingerprint
        write_json(place / "export.json", told)
        place.chmod(0o755)
        replace_folder(place, out)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return told


def save_pretrained(model: CTModel, folder: Path, facts: CardFacts = CardFacts()) -> None:
    """Write artefacts, query settings and card, as `ctx_distill.load` and `CTModel.from_pretrained` open them."""
    parts = model.parts
    artefacts = {"align": parts.dual_artefact}
    artefacts["classifier"] = None if parts.classifier is None else parts.classifier.artefact
    artefacts["report"] = None if parts.decoder is None else parts.decoder.artefact
    for name, artefact in artefacts.items():
        if artefact is not None:
            shutil.copytree(artefact.folder, folder / name / ARTEFACT, dirs_exist_ok=True)
    write_json(folder / USE_FILE, parts.how())
    write_text(folder / "README.md", model_card(parts, facts))


def _export_towers(model: CTModel, place: Path) -> dict[str, Any]:
    parts, again = model.parts, CTModel(open_parts(place)).parts
    told: dict[str, Any] = {"programs": {}, "not_exported": {}, "largest_difference": {}}
    prior = parts.expert is not None
    if prior:
        try:
            _export_image(model, again, place, told, prior=True)
        except InputError:
            raise
        except Exception as error:  # torch.export raises many types; the prior is then excluded and reported
            prior = False
            told["not_exported"]["prior"] = _told(error)
    if not prior:
        _export_image(model, again, place, told, prior=False)
    if parts.dual is not None and again.dual is not None:
        text, path = ReportTower(parts.dual).eval(), place / "text_tower.pt2"
        tokens = text.tokens(TEXTS)
        try:
            export_module(text, text.tokens(TEXTS[:2]), path, (("chunks",), ("chunks",), ("reports", "chunks")))
        except Exception as error:
            path.unlink(missing_ok=True)
            told["not_exported"][path.name] = _told(error)
        else:
            with torch.no_grad():
                wanted = {"text": parts.dual.encode_text(TEXTS)}
                told["largest_difference"][path.name] = _compare(path, tokens, wanted)
                _require("saved text tower", wanted, {"text": again.dual.encode_text(TEXTS)}, 0.0)
            told["programs"][path.name] = {"inputs": list(TEXT), "outputs": ["text (B, D)"]}
    told["weights"] = sorted(str(p.relative_to(place)) for p in place.glob(f"*/{ARTEFACT}/{WEIGHTS_FILE}"))
    return told


def _export_image(model: CTModel, again: Parts, place: Path, told: dict[str, Any], prior: bool) -> None:
    path = place / "image_tower.pt2"
    tower, copy = (ImageTower(parts, prior).eval() for parts in (model.parts, again))
    inputs: tuple[Tensor, ...] = (_volumes(model),)
    if prior:
        inputs += (torch.rand(CHECKED, SIDE, SIDE, generator=torch.Generator().manual_seed(1)),)
    with torch.no_grad():
        said = tower(*inputs)
        _require("saved weights", said, copy(*inputs), 0.0)
        export_module(tower, tuple(one[:2] for one in inputs), path, (("batch",),) * len(inputs))
        told["largest_difference"][path.name] = _compare(path, inputs, said)
    told["programs"][path.name] = {"inputs": [IMAGE, *([PROJECTION] if prior else [])], "outputs": list(said)}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _volumes(model: CTModel) -> Tensor:
    """Return reproducible noise (B, 1, D, H, W) over the whole range of the volume spec."""
    low, high = model.volume_spec.output_range
    noise = torch.rand(CHECKED, 1, *model.volume_spec.shape, generator=torch.Generator().manual_seed(0))
    return low + (high - low) * noise


def _compare(path: Path, inputs: tuple[Tensor, ...], wanted: dict[str, Tensor]) -> float:
    program: Callable[..., Any] = torch.export.load(path).module()
    found = program(*inputs)
    return _require(path.name, wanted, found if isinstance(found, dict) else {"text": found}, LARGEST_DIFFERENCE)


def _require(name: str, wanted: dict[str, Tensor], found: dict[str, Tensor], most: float) -> float:
    """Return the largest difference; raise `InputError` if it exceeds `most` or is not finite."""
    largest = 0.0
    for key, value in wanted.items():
        difference = float((value - found[key]).abs().max())
        largest = max(largest, difference)
        if not difference <= most:
            raise InputError(
                f"export: {name} gives another {key} than the model (difference {difference:.3g}, allowed {most:g}). Nothing"
                " was written. Report this with the versions of torch and of the model's libraries."
            )
    return largest


def push_to_hub(folder: Path, repository: str, private: bool = True, accept_unknown_licences: bool = False) -> str:
    """Upload an export to the Hugging Face hub, under the token of `hf auth login`.

    Args:
        folder: folder that `export_model` wrote.
        repository: `organisation/name`; created if it does not exist.
        private: create it as a private repository.
        accept_unknown_licences: upload even if the licence of a part is unknown.

    Returns:
        The URL of the commit.

    Raises:
        InputError: the folder is no export, or the licence of a part is unknown.
    """
    if not (folder / "export.json").is_file():
        raise InputError(f"{folder}: no export (export.json is missing). Run `ctx-distill export CHECKPOINT {folder}`.")
    unknown = read_record(folder / "export.json").get("unknown_licences") or []
    if unknown and not accept_unknown_licences:
        raise InputError(
            f"{folder}: not uploaded, since nothing states the licence of: {', '.join(unknown)}. Export it again with --license"
            " and --data-license, after finding out whether it may be passed on; or push it with --accept-unknown-licences."
        )
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repository, private=private, exist_ok=True)
    commit = hub.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=f"ctx-distill {__version__}")
    return str(commit.commit_url)

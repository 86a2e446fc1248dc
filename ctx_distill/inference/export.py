"""`ctx-distill export`: a folder to give away, checked to say what the original says, or none."""

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
from ctx_distill.errors import InputError
from ctx_distill.files import write_json, write_text
from ctx_distill.inference.card import model_card, read_record
from ctx_distill.inference.licences import CardFacts, licences, unknown_licences
from ctx_distill.inference.model import CTModel
from ctx_distill.inference.parts import ARTEFACT, USE_FILE, open_parts
from ctx_distill.inference.towers import ImageTower, TextTower, export_module

LARGEST_DIFFERENCE = 1e-4
"""Between the original's and an exported program's numbers, on values of the order of 1, in float32."""

CHECKED = 3  # volumes, of a batch size that the export did not see
TEXTS = ("No focal consolidation.", "A large left pleural effusion.", "Emphysema.")


def export_model(source: Path, out: Path, facts: CardFacts = CardFacts()) -> dict[str, Any]:
    """Write a model's weights (safetensors), card and torch.export programs, and compare them with the original.

    OUT can be opened with `ctx_distill.load`, and given to `push_to_hub`.

    Args:
        source: run folder or artefact.
        out: folder to write; it must not hold anything else.
        facts: for the model card.

    Returns:
        What is in `export.json`: files, largest differences, what could not be exported and why.

    Raises:
        InputError: no model, OUT holds something else, or the export says other things than the original; OUT is then
            left as it was.
    """
    if out.exists() and not (out / "export.json").is_file() and any(out.iterdir()):
        raise InputError(f"{out}: holds files that are no export. Give a new folder.")
    model = CTModel(open_parts(source))
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_pretrained(model, place, facts)
        told = _export_towers(model, place)
        told["unknown_licences"] = unknown_licences(
            licences(model.parts, read_record(model.parts.source / "run.json"), facts)
        )
        told["version"], told["fingerprint"] = __version__, model.fingerprint
        write_json(place / "export.json", told)
        if out.exists():
            shutil.rmtree(out)
        place.chmod(0o755)
        place.replace(out)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return told


def save_pretrained(model: CTModel, folder: Path, facts: CardFacts = CardFacts()) -> None:
    """Write the form that `ctx_distill.load` and `CTModel.from_pretrained` open: artefacts, how they are asked, a card."""
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
    parts = model.parts
    again = CTModel(open_parts(place))
    volumes = _volumes(model)
    tower, copy = ImageTower(parts).eval(), ImageTower(again.parts).eval()
    with torch.no_grad():
        said, saved = tower(volumes), copy(volumes)
        _require("saved weights", said, saved, 0.0)
        export_module(tower, (volumes[:2],), place / "image_tower.pt2")
        differences = {"image_tower.pt2": _compare(place / "image_tower.pt2", (volumes,), said)}
    told: dict[str, Any] = {"image": list(said), "not_exported": {}}
    if parts.dual is not None:
        text, path = TextTower(parts.dual).eval(), place / "text_tower.pt2"
        tokens = text.tokens(TEXTS)
        try:
            export_module(text, (tokens[0][:2], tokens[1][:2]), path)
        except Exception as error:  # torch.export refuses with many kinds; the tower is then left out, and that is said
            path.unlink(missing_ok=True)
            told["not_exported"]["text_tower.pt2"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        else:
            with torch.no_grad():
                wanted = {"text": parts.dual.encode_text(TEXTS)}
                differences["text_tower.pt2"] = _compare(path, tokens, wanted)
                _require("saved text tower", wanted, {"text": again.parts.dual.encode_text(TEXTS)}, 0.0)  # type: ignore[union-attr]
    told["largest_difference"] = differences
    told["weights"] = sorted(str(p.relative_to(place)) for p in place.glob(f"*/{ARTEFACT}/{WEIGHTS_FILE}"))
    return told


def _volumes(model: CTModel) -> Tensor:
    """(B, 1, D, H, W): noise over the whole range of the volume spec, always the same."""
    low, high = model.volume_spec.output_range
    noise = torch.rand(CHECKED, 1, *model.volume_spec.shape, generator=torch.Generator().manual_seed(0))
    return low + (high - low) * noise


def _compare(path: Path, inputs: tuple[Tensor, ...], wanted: dict[str, Tensor]) -> float:
    program: Callable[..., Any] = torch.export.load(path).module()
    found = program(*inputs)
    return _require(path.name, wanted, found if isinstance(found, dict) else {"text": found}, LARGEST_DIFFERENCE)


def _require(name: str, wanted: dict[str, Tensor], found: dict[str, Tensor], most: float) -> float:
    """The largest difference; `InputError` where it is larger than `most`, or a value is not finite."""
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
        folder: that `export_model` wrote.
        repository: `organisation/name`; made where it does not exist.
        private: whether a new one is.
        accept_unknown_licences: upload it although the licence of a part is not known.

    Returns:
        The commit's address.

    Raises:
        InputError: the folder is no export, or the licence of a part is not known.
    """
    if not (folder / "export.json").is_file():
        raise InputError(f"{folder}: no export (export.json is missing). Run `ctx-distill export CHECKPOINT {folder}`.")
    unknown = read_record(folder / "export.json").get("unknown_licences") or []
    if unknown and not accept_unknown_licences:
        raise InputError(
            f"{folder}: not uploaded, since nothing tells the licence of: {', '.join(unknown)}. Export it again with --license"
            " and --data-license, after finding out whether it may be passed on; or push it with --accept-unknown-licences."
        )
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repository, private=private, exist_ok=True)
    commit = hub.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=f"ctx-distill {__version__}")
    return str(commit.commit_url)

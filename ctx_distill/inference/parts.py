"""The parts of a run folder or an artefact, opened and checked to be trained together."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ctx_distill.checkpoint import Artefact, load_weights, read_artefact, require_same
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.errors import InputError
from ctx_distill.models.ct_encoder import CTEncoder, build_ct_encoder
from ctx_distill.models.decoder_artefact import load_decoder
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.models.heads import FindingsHead
from ctx_distill.models.report_decoder import ReportDecoder
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.run_files import ARTEFACT, ARTEFACT_FILE, CONFIG_FILE, PREDICTIONS
from ctx_distill.stages.shared.projection_prior import open_prior_expert
from ctx_distill.text.extractor import load_vocabulary
from ctx_distill.text.prompts import Templates

USE_FILE = "use.json"
"""Query settings of an export, in place of the stages' configurations."""
AGAIN = "Give a run folder whose parts were trained together."


@dataclass(frozen=True)
class Asked:
    """The zero-shot query of the run; see `ctx_distill.stages.shared.prompt_scores.prompt_features`.

    Attributes:
        findings: F names.
        templates: the prompts.
        synonyms: also query with synonyms of the findings.
    """

    findings: tuple[str, ...]
    templates: Templates = "normal"
    synonyms: bool = True


@dataclass(frozen=True)
class Classifier:
    """A findings head.

    Attributes:
        findings: its F names.
        head: (B, D_c) to logits (B, F).
        encoder: its fine-tuned encoder; None: the dual encoder's.
        artefact: the artefact that it was opened from.
    """

    findings: tuple[str, ...]
    head: FindingsHead
    encoder: CTEncoder | None
    artefact: Artefact


@dataclass(frozen=True)
class Decoder:
    """A report decoder on the dual encoder's CT tokens, and its generation settings.

    Attributes:
        model: the decoder.
        artefact: the artefact that it was opened from.
        max_length: longest report in tokens.
        beams: number of beams of the beam search.
        no_repeat: length of token groups that must not repeat; 0 allows all.
        min_length: shortest report in tokens.
        length_penalty: power of the length that a beam's score is divided by.
    """

    model: ReportDecoder
    artefact: Artefact
    max_length: int
    beams: int = 1
    no_repeat: int = 0
    min_length: int = 0
    length_penalty: float = 1.0


@dataclass(frozen=True)
class Parts:
    """Everything that `CTModel` runs.

    Attributes:
        source: the folder that was opened.
        spec: the volume spec to which scans are resampled.
        dual: the dual encoder; None for a fine-tuned classifier alone.
        dual_artefact: the artefact of the dual encoder.
        expert: the frozen X-ray expert of the projection prior; None if the dual encoder has no prior.
        asked: the zero-shot query.
        classifier: the classifier, if there is one.
        decoder: the report decoder, if there is one.
        index: folder of the X-ray index, if there is one.
    """

    source: Path
    spec: VolumeSpec
    dual: DualEncoder | None
    dual_artefact: Artefact | None
    expert: XrayExpert | None
    asked: Asked
    classifier: Classifier | None
    decoder: Decoder | None
    index: Path | None

    def how(self) -> dict[str, Any]:
        """Return the query settings of the parts, as JSON values."""
        found: dict[str, Any] = {"zero_shot": asdict(self.asked)}
        if self.decoder is not None:
            names = ("max_length", "beams", "no_repeat", "min_length", "length_penalty")
            found["report"] = {name: getattr(self.decoder, name) for name in names}
        return found


def open_parts(path: Path, vocabulary: str | None = None, index: Path | None = None) -> Parts:
    """Open a run folder, a stage's folder, or the artefact of a dual encoder or classifier.

    Args:
        path: a run, of which every part is opened; or an artefact, which is opened with the parts that it needs.
        vocabulary: zero-shot findings if the run's zero-shot stage names none; None for `ct-rate`.
        index: folder of the X-ray index; None takes the run's.

    Raises:
        InputError: the folder has no usable part, or its parts were not trained together.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder. Expected a run folder, or an artefact of stage 3 or 4.")
    if (path / ARTEFACT / ARTEFACT_FILE).is_file():
        path = path / ARTEFACT
    if not (path / ARTEFACT_FILE).is_file():
        return _of_run(path, vocabulary, index)
    kind = _kind(path)
    if kind == "dual-encoder":
        return _together(path, path, None, None, _asked(None, vocabulary), index)
    if kind == "classifier":
        artefact = read_artefact(path, "classifier")
        alone = artefact.config["mode"] == "finetune"
        dual = path.parents[1] / "align" / ARTEFACT
        if not alone and not (dual / ARTEFACT_FILE).is_file():
            raise InputError(
                f"{path}: a linear probe on a dual encoder, which was expected at {dual}. Give the run folder."
            )
        return _together(path, None if alone else dual, path, None, _asked(None, vocabulary), index)
    raise InputError(
        f"{path}: holds a {kind} artefact, which cannot predict a CT alone. Give a run folder, or the artefact of"
        " a dual encoder (RUN/align/artefact) or classifier (RUN/classifier/artefact)."
    )


def _kind(folder: Path) -> str:
    try:
        return str(json.loads((folder / ARTEFACT_FILE).read_text())["kind"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{folder / ARTEFACT_FILE}: not a readable artefact record ({error}). {AGAIN}") from error


def _of_run(run: Path, vocabulary: str | None, index: Path | None) -> Parts:
    found = {
        stage: run / stage / ARTEFACT
        for stage in ("align", "classifier", "report", "index")
        if (run / stage / ARTEFACT / ARTEFACT_FILE).is_file()
    }
    if "align" not in found and "classifier" not in found:
        raise InputError(
            f"{run}: neither an artefact ({ARTEFACT_FILE}) nor a run folder with align/{ARTEFACT} or"
            f" classifier/{ARTEFACT}. Run `ctx-distill align`, or give another folder."
        )
    asked = _asked(run / "zero_shot", vocabulary)
    dual, classifier, report = (found.get(stage) for stage in ("align", "classifier", "report"))
    return _together(run, dual, classifier, report, asked, index or found.get("index"))


def _asked(stage: Path | None, vocabulary: str | None) -> Asked:
    if stage is not None and vocabulary is None:
        exported = _exported(stage.parent).get("zero_shot")
        if exported is not None:
            return Asked(tuple(exported["findings"]), exported["templates"], bool(exported["synonyms"]))
    table = None if stage is None else stage / PREDICTIONS
    if stage is None or table is None or not table.is_file() or vocabulary is not None:
        return Asked(tuple(load_vocabulary(vocabulary or "ct-rate").names))
    with table.open(newline="", encoding="utf-8") as file:
        names = tuple(next(csv.reader(file))[1:])
    settings = _settings(stage)
    asked = names or tuple(load_vocabulary(settings.get("vocabulary", "ct-rate")).names)
    return Asked(asked, settings.get("templates", "normal"), bool(settings.get("synonyms", True)))


def _exported(folder: Path) -> dict[str, Any]:
    path = folder / USE_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}). Export the model again.") from error


def _settings(stage: Path) -> dict[str, Any]:
    """Return `model.init_args` of a stage's resolved configuration; empty if there is none."""
    config = stage / CONFIG_FILE
    if not config.is_file():
        return {}
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["init_args"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{config}: not a stage's configuration ({error}). Run the stage again.") from error
    return dict(settings)


def _together(
    source: Path,
    dual_folder: Path | None,
    classifier: Path | None,
    report: Path | None,
    asked: Asked,
    index: Path | None,
) -> Parts:
    dual, artefact, expert = None, None, None
    if dual_folder is not None:
        dual, artefact = DualEncoder.load(dual_folder)
        dual.requires_grad_(False)
        expert = open_prior_expert(artefact, dual.embed_dim)
    head = None if classifier is None else _classifier(classifier, artefact, dual)
    decoder = None
    if report is not None and artefact is not None:
        decoder = _decoder(report, artefact)
    first = artefact if artefact is not None else head.artefact if head is not None else None
    assert first is not None
    spec = VolumeSpec.from_config(first.config["volume_spec"])
    if index is not None and (index / ARTEFACT / ARTEFACT_FILE).is_file():
        index = index / ARTEFACT
    return Parts(source, spec, dual, artefact, expert, asked, head, decoder, index)


def _belongs(artefact: Artefact, dual: Artefact | None) -> None:
    if dual is not None and "dual-encoder" in artefact.upstream:
        require_same(
            f"the dual encoder that {artefact.folder} was trained on", artefact.upstream["dual-encoder"],
            f"{dual.folder}", dual.fingerprint,
            "Run stage 4 again after stage 3.",
        )  # fmt: skip


def _classifier(folder: Path, dual_artefact: Artefact | None, dual: DualEncoder | None) -> Classifier:
    artefact = read_artefact(folder, "classifier")
    _belongs(artefact, dual_artefact)
    config, tensors = artefact.config, artefact.weights()
    encoder = None
    if config["mode"] == "finetune":
        encoder = build_ct_encoder(config["encoder"])
        load_weights(encoder, tensors, "encoder.", str(folder))
        encoder.eval().requires_grad_(False)
    elif dual is None:
        raise InputError(f"{folder}: a linear probe without the dual encoder that it was trained on. {AGAIN}")
    width = encoder.embed_dim if encoder is not None else dual.ct_encoder.embed_dim if dual is not None else 0
    names: Sequence[str] = config["findings"]
    head = FindingsHead(width, len(names), bool(config.get("norm", True)))
    load_weights(head, tensors, "head.", str(folder))
    return Classifier(tuple(names), head.eval().requires_grad_(False), encoder, artefact)


def _decoder(folder: Path, dual: Artefact) -> Decoder:
    model, artefact = load_decoder(folder)
    _belongs(artefact, dual)
    settings = _exported(folder.parents[1]).get("report") or _settings(folder.parent)
    return Decoder(
        model.requires_grad_(False),
        artefact,
        int(settings.get("max_length", model.max_length)),
        int(settings.get("beams", 1)),
        int(settings.get("no_repeat", 0)),
        int(settings.get("min_length", 0)),
        float(settings.get("length_penalty", 1.0)),
    )

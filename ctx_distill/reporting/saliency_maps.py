"""Write the saliency maps of a run's page to `RUN/saliency/`.

    RUN/saliency/<zero_shot|classifier>/<study>/<finding>.nii.gz   float32, on the scan's voxels, in units of the logit
    RUN/saliency/saliency.json                                     list of the maps, with model and method

Existing maps of the same model and scan are kept; those of other models are deleted.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ctx_distill.errors import InputError
from ctx_distill.files import write_json
from ctx_distill.reporting.overlays import FOLDER, RECORD, Key, map_file, read_record
from ctx_distill.reporting.wanted_maps import Wanted, wanted_maps
from ctx_distill.runs.run_reader import gather


def write_saliency(run: Path) -> tuple[int, int]:
    """Compute the missing maps.

    Returns:
        The number of maps, and how many of them are new.
    """
    gathered = gather(run)
    wanted = wanted_maps(gathered)
    standing = read_record(run)
    if not wanted and not standing:
        return 0, 0
    kept: dict[Key, dict[str, Any]] = {}
    made = 0
    for model, group in groupby(sorted(wanted, key=lambda one: one.model), key=lambda one: one.model):
        try:
            opened = _open(run, model)
        except InputError as error:
            print(f"saliency: no maps of {model}: {error}")
            continue
        for study, ones in groupby(sorted(group, key=lambda one: one.study_id), key=lambda one: one.study_id):
            assert gathered.ct is not None
            listed = [one for one in ones if one.finding in opened.findings]
            try:
                found = _study(run, opened, gathered.ct.scan_file(listed[0].row) if listed else None, listed, standing)
            except (InputError, OSError) as error:  # the page is still useful without a map
                print(f"saliency: no map of {study}: {error}")
                continue
            made += sum(new for _, new in found)
            kept |= {(model, study, one["finding"]): one for one, _ in found}
            _write(run, {**{key: one for key, one in standing.items() if key not in kept}, **kept})
    for key, one in standing.items():
        if key not in kept:
            (run / FOLDER / str(one.get("file", "none"))).unlink(missing_ok=True)
    _write(run, kept)
    return len(kept), made


def _write(run: Path, maps: dict[Key, dict[str, Any]]) -> None:
    write_json(run / FOLDER / RECORD, {"maps": [maps[key] for key in sorted(maps)]})


def _open(run: Path, model: str) -> Any:
    """Open the run's model with the requested head only: the classifier, or zero-shot."""
    import torch

    from ctx_distill.inference.model import CTModel
    from ctx_distill.inference.parts import open_parts

    parts = replace(open_parts(run), decoder=None)
    if model == "zero_shot":
        parts = replace(parts, classifier=None)
    if (parts.classifier is None) != (model == "zero_shot") or (model == "zero_shot" and parts.dual is None):
        raise InputError(f"{run}: has no {model.replace('_', '-')} model. Run its stage.")
    return CTModel(parts).to("cuda" if torch.cuda.is_available() else "cpu")


def _study(
    run: Path, model: Any, file: Any, wanted: list[Wanted], standing: dict[Key, dict[str, Any]]
) -> list[tuple[dict[str, Any], bool]]:
    """Return the records of one study's maps, each with whether it is new."""
    if file is None:
        return []
    stamp, found, missing = str(file.stamp()), [], []
    for one in wanted:
        known = standing.get((one.model, one.study_id, one.finding), {})
        same = known.get("fingerprint") == model.fingerprint and known.get("scan") == stamp
        if same and (run / FOLDER / str(known.get("file"))).is_file():
            found.append((known, False))
        else:
            missing.append(one)
    if not missing:
        return found
    maps = model.predict_volume(file.read(), saliency=[one.finding for one in missing]).saliency
    for one in missing:
        name = map_file(one.model, one.study_id, one.finding)
        maps[one.finding].write(run / FOLDER / name)
        record = {"model": one.model, "study_id": one.study_id, "finding": one.finding, "file": name,
                  "method": maps[one.finding].method, "fingerprint": model.fingerprint, "scan": stamp}  # fmt: skip
        found.append((record, True))
    return found

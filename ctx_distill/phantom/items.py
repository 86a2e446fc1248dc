"""The studies of a cohort: which person, findings and words each has, and the file of each image.

Everything about an item follows from (seed, kind, index) alone, so that workers may make items in any order. This
module runs in worker processes: it imports neither torch nor `ctx_distill.types`, which would cost seconds of start.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ctx_distill.files import write_bytes
from ctx_distill.phantom.anatomy import Person, sample_person
from ctx_distill.phantom.ct_scan import ct_grid, ct_volume, nifti_bytes
from ctx_distill.phantom.film import radiograph
from ctx_distill.phantom.planted_findings import PlantedFinding, sample_findings
from ctx_distill.phantom.reports import Report, write_report

Modality = Literal["ct", "xray"]

_KIND = {"ct": 1, "xray": 2}
_PERSON, _ORDER, _FINDINGS, _REPORT, _IMAGE = 0, 1, 2, 3, 4  # _ORDER is used by `findings.sample_findings`
# Cycles of patients: both keep every split alive in a cohort of a handful.
_SPLITS = {
    "ct": ["train", "test", "train", "val", "train", "test", "train", "train", "test", "train"],
    "xray": ["train", "train", "train", "val", "train", "train", "test"] + ["train"] * 6 + ["test"] + ["train"] * 6,
}
_FOLLOW_UP = 20  # every 20th radiograph is the second study of the patient before
_SECOND_RECONSTRUCTION = 33  # every 33rd CT study has two images
_ORIENTATIONS = ("LPS", "LPS", "LPS", "RAS", "RAS", "LAS")


@dataclass(frozen=True)
class PhantomStudy:
    """One study of the cohort.

    Attributes:
        modality: "ct" or "xray".
        index: number of the study in its modality.
        study_id, patient_id, split: as in the manifest.
        image_ids: one, or two for a CT with two reconstructions; an image's file bears its id.
        person: the person without findings.
        findings: what is planted.
        report: what is written.
    """

    modality: Modality
    index: int
    study_id: str
    patient_id: str
    split: str
    image_ids: tuple[str, ...]
    person: Person
    findings: list[PlantedFinding]
    report: Report

    def image_path(self, image_id: str) -> str:
        """The image's path relative to the cohort's folder."""
        return f"{self.modality}/{image_id}" + (".nii.gz" if self.modality == "ct" else ".png")


def _rng(seed: int, modality: Modality, stream: int, index: int, *more: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, _KIND[modality], stream, index, *more]))


def plan_study(seed: int, modality: Modality, index: int) -> PhantomStudy:
    """Everything about a study but its image: cheap, so that the manifest needs no worker."""
    patient = index - (index + 1) // _FOLLOW_UP if modality == "xray" else index
    splits = _SPLITS[modality]
    code = "CT" if modality == "ct" else "XR"
    study_id = f"{code}{index:06d}"
    twice = modality == "ct" and index % _SECOND_RECONSTRUCTION == 5
    person = sample_person(_rng(seed, modality, _PERSON, patient))
    planted = sample_findings(seed, _KIND[modality], index, _rng(seed, modality, _FINDINGS, index))
    return PhantomStudy(
        modality=modality,
        index=index,
        study_id=study_id,
        patient_id=f"P{code}{patient:06d}",
        split=splits[patient % len(splits)],
        image_ids=(study_id, f"{study_id}-2") if twice else (study_id,),
        person=person,
        findings=planted,
        report=write_report(planted, modality, person.contrast, _rng(seed, modality, _REPORT, index)),
    )


def image_bytes(seed: int, study: PhantomStudy, number: int) -> bytes:
    """The file of a study's image: .nii.gz of a CT's reconstruction `number`, .png of a radiograph."""
    rng = _rng(seed, study.modality, _IMAGE, study.index, number)
    if study.modality == "xray":
        stream = io.BytesIO()
        Image.fromarray(radiograph(study.person, study.findings, rng)).save(stream, "PNG", compress_level=3)
        return stream.getvalue()
    grid = ct_grid(study.person, rng)
    volume = ct_volume(study.person, study.findings, grid, rng)
    return nifti_bytes(volume, grid, _ORIENTATIONS[int(rng.integers(len(_ORIENTATIONS)))])


def make_images(out: Path, seed: int, modality: Modality, indices: list[int]) -> int:
    """Writes those images of the given studies that are not there yet; returns how many studies it went through."""
    for index in indices:
        study = plan_study(seed, modality, index)
        for number, image_id in enumerate(study.image_ids):
            path = out / study.image_path(image_id)
            if not path.exists():
                write_bytes(path, image_bytes(seed, study, number))
    return len(indices)

"""Rad-ChestCT in miniature: npz on a grid of 0.8 mm from head to feet, and two maps of its labels."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctx_distill.commands.main import main
from ctx_distill.data.io.volume import read_volume
from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec, prepare_volume
from ctx_distill.errors import InputError

ABNORMALITIES = [
    "calcification", "cardiomegaly", "pericardial_effusion", "hernia", "emphysema", "atelectasis", "opacity",
    "pleural_effusion", "bronchial_wall_thickening", "consolidation", "bronchiectasis", "septal_thickening", "nodule",
    "nodulegr1cm", "fibrosis", "scarring", "lymphadenopathy", "catheter_or_port", "tracheal_tube", "chest_tube",
    "breast_implant", "pacemaker_or_defib", "stent", "clip", "staple", "gi_tube", "hardware", "suture",
]  # fmt: skip
PRESENT = {
    "trn00001": ["calcification*aorta", "scarring*left_upper", "nodulegr1cm*right_lung"],
    "val00001": ["fibrosis*lung"],
}
NAMES = {"trn": "imgtrain", "val": "imgvalid", "tst": "imgtest"}


def voxels() -> np.ndarray:
    """(slice from the head, row, column): the first slice's first voxel is marked."""
    volume = np.full((6, 8, 10), -1000, dtype=np.int16)
    volume[0, 0, 0] = 700
    return volume


def write_tree(root: Path) -> Path:
    locations = ["aorta", "left_upper", "right_lung", "lung"]
    columns = [f"{a}*{where}" for a in ABNORMALITIES for where in locations]
    for prefix, name in NAMES.items():
        ids = [f"{prefix}00001"]
        table = pd.DataFrame(0, index=ids, columns=columns)
        for image_id in ids:
            table.loc[image_id, PRESENT.get(image_id, [])] = 1
            np.savez_compressed(root / f"{image_id}.npz", ct=voxels())
        table.rename_axis("NoteAcc_DEID").to_csv(root / f"{name}_Abnormality_and_Location_Labels.csv")
    return root


def built(root: Path, labels: str) -> Manifest:
    assert main(["manifest", "rad-chestct", str(root), str(root / "ct.csv"), "--labels", labels]) == 0
    return read_manifest(root / "ct.csv")


def test_splits_and_both_maps(tmp_path: Path) -> None:
    write_tree(tmp_path)
    hlip, radfinder = built(tmp_path, "hlip"), built(tmp_path, "radfinder")
    assert hlip.frame.set_index("image_id")["split"].to_dict() == {
        "trn00001": "train",
        "val00001": "val",
        "tst00001": "test",
    }
    assert len(hlip.finding_names) == 15
    assert len(radfinder.finding_names) == 17
    one = hlip.frame.set_index("image_id")
    other = radfinder.frame.set_index("image_id")
    for table in (one, other):
        assert table.loc["trn00001", "label:arterial wall calcification"] == 1
        assert table.loc["trn00001", "label:coronary artery wall calcification"] == 1
    assert (one.loc["trn00001", "label:lung nodule"], other.loc["trn00001", "label:lung nodule"]) == (0, 1)
    assert (
        one.loc["trn00001", "label:pulmonary fibrotic sequela"],
        one.loc["val00001", "label:pulmonary fibrotic sequela"],
    ) == (0, 1)
    assert (
        other.loc["trn00001", "label:pulmonary fibrotic sequela"],
        other.loc["val00001", "label:pulmonary fibrotic sequela"],
    ) == (1, 0)
    assert "label:medical material" not in one.columns
    assert len(built(tmp_path, "own").finding_names) == len(ABNORMALITIES)


def test_the_first_slice_is_the_patients_head(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "trn1.npz", ct=voxels())
    scan = read_volume(tmp_path / "trn1.npz")
    np.testing.assert_allclose(scan.spacing, (0.8, 0.8, 0.8))
    spec = VolumeSpec((0.8, 0.8, 0.8), (6, 8, 10), antialias=False)
    tensor = prepare_volume(scan, spec)[0].numpy()
    # D grows to the head, H to the back, W to the left: the marked voxel is highest, foremost, on the patient's right.
    assert np.unravel_index(tensor.argmax(), tensor.shape) == (5, 0, 0)


class Danger:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1/0",)


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "trn1.npz"
    np.savez(path, ct=np.array([Danger()], dtype=object))
    with pytest.raises(InputError, match="contains pickled objects, which are never loaded"):
        read_volume(path)
    content = io.BytesIO()
    np.lib.format.write_array(content, np.zeros((2, 2, 2), dtype=np.int16))
    lying = content.getvalue().replace(b"'<i2'", b"'|O' ")[:128] + pickle.dumps(Danger())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ct.npy", lying)
    with pytest.raises(InputError, match="pickled objects"):
        read_volume(path)


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.95])
def test_a_truncated_archive(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "trn1.npz"
    np.savez_compressed(path, ct=np.random.default_rng(0).integers(-1000, 1000, (9, 9, 9), dtype=np.int16))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match="not a readable NumPy archive"):
        read_volume(path)


def test_other_contents(tmp_path: Path) -> None:
    path = tmp_path / "trn1.npz"
    np.savez(path, image=voxels())
    with pytest.raises(InputError, match=r"contains image.npy; expected the array 'ct'"):
        read_volume(path)
    np.savez(path, ct=voxels().astype(np.complex64))
    with pytest.raises(InputError, match="voxels of type complex64"):
        read_volume(path)
    np.savez(path, ct=voxels()[0])
    with pytest.raises(InputError, match="2 dimensions"):
        read_volume(path)


def test_a_table_with_other_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first column holds the volumes, with or without their suffix; a label that cannot be told is left out and said."""
    write_tree(tmp_path)
    for path in tmp_path.glob("*Labels.csv"):
        frame = pd.read_csv(path, dtype=str).rename(columns={"NoteAcc_DEID": "volume"})
        frame["volume"] += ".npz"
        frame.drop(columns=[name for name in frame if name.startswith("scarring*")]).to_csv(path, index=False)
    manifest = built(tmp_path, "radfinder")
    assert manifest.frame["image_id"].tolist() == ["trn00001", "val00001", "tst00001"]
    assert "pulmonary fibrotic sequela" not in manifest.finding_names
    assert len(manifest.finding_names) == 16
    assert "without label: pulmonary fibrotic sequela" in capsys.readouterr().out
    assert len(built(tmp_path, "hlip").finding_names) == 15
    frame[["volume"]].to_csv(path, index=False)
    assert main(["manifest", "rad-chestct", str(tmp_path), str(tmp_path / "ct.csv")]) == 2
    assert "no column abnormality*location" in capsys.readouterr().err

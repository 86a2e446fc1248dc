"""What `make bench-train` trains on: prepared phantom CTs, an untrained X-ray expert, a synthetic index of its width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOLUMES = {
    (96, 192, 192): ((3.0, 1.5, 1.5), (-1000.0, 1000.0)),
    (112, 256, 352): ((3.0, 1.0, 1.0), (-1150.0, 350.0)),
}
"""Spacing (mm) and window (HU) of the presets `base` and `large`."""


def volume_spec(shape: tuple[int, int, int]) -> Any:
    """The preset's volume spec of this shape; another shape covers about the same 288 mm."""
    from ctx_distill.data.transforms.model_volume import VolumeSpec

    spacing, window = VOLUMES.get(shape, (tuple(288.0 / edge for edge in shape), (-1000.0, 1000.0)))
    return VolumeSpec(spacing=spacing, shape=shape, window=window)


def make_data(
    folder: Path, volumes: dict[tuple[int, int, int], int], index_rows: int, embed_dim: int, workers: int | None
) -> dict[tuple[int, int, int], Path]:
    """Make what does not exist yet.

    Args:
        folder: where.
        volumes: how many CTs are prepared in each shape; all of them are training rows.
        index_rows: X-rays in the index.
        embed_dim: D_e.
        workers: processes; None for one per core.

    Returns:
        The manifest of each shape.
    """
    import pandas as pd
    import yaml

    from ctx_distill.data.manifests.manifest import read_manifest
    from ctx_distill.files import write_text
    from ctx_distill.models.experts.open_clip_expert import make_expert_folder
    from ctx_distill.phantom.cohort import write_cohort
    from ctx_distill.runs.prepare_volumes import prepare_manifest

    ct = folder / f"ct-{max(volumes.values())}"
    manifests = {shape: ct / f"ct-{'x'.join(map(str, shape))}.csv" for shape in volumes}
    write_cohort(ct, ct=max(volumes.values()), xray=1, seed=0, workers=workers)
    for shape, count in volumes.items():
        table = pd.read_csv(ct / "ct.csv", dtype=str, keep_default_na=False).iloc[:count].assign(split="train")
        write_text(manifests[shape], table.to_csv(index=False, lineterminator="\n"))
        spec = volume_spec(shape)
        layer = {"volume": {"spacing": list(spec.spacing), "shape": list(shape), "window": list(spec.window)}}
        preset = folder / f"{'x'.join(map(str, shape))}.yaml"
        preset.write_text(yaml.safe_dump({"ct": {"data": {"init_args": {**layer, "projection": False}}}}))
        out = folder / "prepared" / preset.stem
        out.parent.mkdir(exist_ok=True)
        prepare_manifest(manifests[shape], out, str(preset), workers, None)
    if not (folder / "expert").exists():
        manifest = read_manifest(ct / "ct.csv", check_images=False)
        reports = [manifest.report(row) for row in manifest.frame.index]
        make_expert_folder(
            folder / "expert.partial", reports, image_size=64, embed_dim=embed_dim, text_width=embed_dim,
            text_layers=6, vocab_size=500,
        )  # fmt: skip
        (folder / "expert.partial").replace(folder / "expert")
    if not (folder / "index").exists():
        _write_index(folder / "index", folder / "expert", index_rows)
    return manifests


def _write_index(folder: Path, expert: Path, rows: int) -> None:
    """Keys and values around random centres, of the expert's width (`benchmarks/index.py` has the same at 512)."""
    import pandas as pd
    import torch
    import torch.nn.functional as F

    from ctx_distill.models.opening import open_expert
    from ctx_distill.retrieval.store import write_index_artefact

    opened = open_expert(str(expert))
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(min(rows, 4000), opened.embed_dim, generator=draw)
    near = torch.randint(0, len(centres), (rows,), generator=draw)
    keys, values = (
        F.normalize(centres[near] + torch.randn(rows, opened.embed_dim, generator=draw), dim=-1) for _ in range(2)
    )
    names = [f"{row:07d}" for row in range(rows)]
    items = pd.DataFrame(
        {"study_id": names, "image_id": names, "patient_id": names, "row": range(rows), "split": "train"}
    )
    upstream = {"xray-expert": opened.fingerprint(), "xray-manifest": "synthetic"}
    write_index_artefact(folder, keys, values, items, upstream, {"key": "text"}, value_type="float16")

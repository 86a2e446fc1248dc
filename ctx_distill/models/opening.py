"""Open an X-ray expert or a text tower of any supported library from its folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from ctx_distill.models.text_tower import TOWER_FILE, TextTower
from ctx_distill.models.weights import refuse_remote_code, resolve_source
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.types import InputError

logger = logging.getLogger(__name__)


def _open_folder(folder: Path) -> XrayExpert:
    if (folder / "open_clip_config.json").is_file():
        from ctx_distill.models.experts.open_clip_expert import OpenClipExpert

        return OpenClipExpert(folder)
    if (folder / "xrv_config.json").is_file():
        from ctx_distill.models.experts.torchxrayvision_expert import TorchXrayVisionExpert

        return TorchXrayVisionExpert(folder)
    if (folder / "config.json").is_file():
        from ctx_distill.models.experts.transformers_expert import TransformersExpert

        return TransformersExpert(folder)
    files = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise InputError(
        f"{folder}: no X-ray expert. Expected open_clip_config.json (open_clip), xrv_config.json"
        f" (torchxrayvision, converted) or config.json (transformers); found {files}. Fetch one with"
        " `ctx-distill weights fetch`, convert one with `ctx-distill weights convert-torchxrayvision`, or train one with"
        " `ctx-distill expert`."
    )


def open_expert(source: str, revision: str | None = None) -> XrayExpert:
    """Open a frozen X-ray expert from a folder or from the hub.

    Args:
        source: a folder (with `open_clip_config.json`, `xrv_config.json`, or the `config.json` of transformers), or
            `hf-hub:organisation/name`.
        revision: full commit hash; required for the hub, and compared with the revision recorded in a folder.

    Returns:
        The expert, frozen and in eval mode.

    Raises:
        InputError: no expert; the message lists the expected files and how to obtain them.
    """
    folder = resolve_source(source, revision)
    refuse_remote_code(folder)
    with torch.random.fork_rng(devices=[]):  # building a model draws random weights; preserve the caller's random state
        expert = _open_folder(folder)
    expert.freeze()
    logger.info("X-ray expert %s (%s), licence %s, revision %s", expert.name, expert.kind, expert.license,
                expert.revision or "not known")  # fmt: skip
    return expert


def load_text_tower(folder: Path) -> TextTower:
    """Build a tower from the files of `save_files`, with random weights.

    Raises:
        InputError: the folder has no text tower.
    """
    path = folder / TOWER_FILE
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; expected the text tower of an artefact. Rerun the stage that creates it."
        )
    config = json.loads(path.read_text())
    if config["kind"] == "open_clip":
        from ctx_distill.models.experts.open_clip_text import OpenClipTextTower

        return OpenClipTextTower.build(config, folder)
    from ctx_distill.models.experts.transformers_expert import TransformersTextTower

    return TransformersTextTower.build(config, folder)

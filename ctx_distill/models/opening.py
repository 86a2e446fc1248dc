"""Open an X-ray expert or a text tower of any kind from its folder. The only module that knows all kinds."""

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
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise InputError(
        f"{folder}: no X-ray expert here. Looked for open_clip_config.json (open_clip), xrv_config.json"
        f" (torchxrayvision, converted) and config.json (transformers); found {found}. Fetch one with"
        " `ctx-distill weights fetch`, convert one with `ctx-distill weights convert-torchxrayvision`, or train one with"
        " `ctx-distill expert`."
    )


def open_expert(source: str, revision: str | None = None) -> XrayExpert:
    """Open a frozen X-ray expert from a folder or from the hub.

    Args:
        source: a folder (its kind is told by its files: `open_clip_config.json`, `xrv_config.json`, or the
            `config.json` of transformers), or `hf-hub:organisation/name`.
        revision: full commit hash; needed for the hub, and checked against what a folder says of itself.

    Raises:
        InputError: nothing usable is there; the message says what was looked for and how to place it.
    """
    folder = resolve_source(source, revision)
    refuse_remote_code(folder)
    with torch.random.fork_rng(devices=[]):  # building a model draws weights; the caller's random state must not move
        expert = _open_folder(folder)
    expert.freeze()
    logger.info("X-ray expert %s (%s), licence %s, revision %s", expert.name, expert.kind, expert.license,
                expert.revision or "not known")  # fmt: skip
    return expert


def load_text_tower(folder: Path) -> TextTower:
    """Build a tower from what `save_files` wrote; its weights are random until they are loaded.

    Raises:
        InputError: the folder holds no tower.
    """
    path = folder / TOWER_FILE
    if not path.is_file():
        raise InputError(
            f"{path}: not found, expected the text tower of an artefact. Run the stage that makes it again."
        )
    config = json.loads(path.read_text())
    if config["kind"] == "open_clip":
        from ctx_distill.models.experts.open_clip_text import OpenClipTextTower

        return OpenClipTextTower.build(config, folder)
    from ctx_distill.models.experts.transformers_expert import TransformersTextTower

    return TransformersTextTower.build(config, folder)

"""X-ray experts of open_clip: pretrained ones such as BiomedCLIP, and the small one that `ctx-distill expert` trains."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ctx_distill.files import write_json
from ctx_distill.models.experts.open_clip_text import CONFIG_FILE, OpenClipTextTower, open_tokenizer
from ctx_distill.models.preprocessing import ImagePreprocessing
from ctx_distill.models.text_tower import tokenizer_hash
from ctx_distill.models.weights import OPEN_CLIP_PICKLE, find_text_config, hash_weights
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.types import InputError

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "open_clip_model.safetensors"
_WEIGHT_NAMES = (WEIGHTS_FILE, "open_clip_pytorch_model.safetensors", "model.safetensors", OPEN_CLIP_PICKLE)
_PREPROCESS_DEFAULTS: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


class OpenClipExpert(XrayExpert):
    """A folder in open_clip's `local-dir:` layout (a snapshot of a hub repository is one)."""

    kind = "open_clip"

    def __init__(self, folder: Path) -> None:
        """Read configuration, weights and tokenizer.

        Raises:
            InputError: one of them is missing, does not fit, or would need unrestricted unpickling.
        """
        config = _read_config(folder)
        model_cfg = config["model_cfg"]
        weights = _find_weights(folder)
        model, quick_gelu = _build_model(folder, model_cfg)
        _load_weights(model, weights)
        text_cfg = model_cfg["text_cfg"]
        tower = OpenClipTextTower(
            model.text, model_cfg["embed_dim"], text_cfg, quick_gelu, open_tokenizer(folder, text_cfg)
        )
        super().__init__(
            folder,
            embed_dim=int(model_cfg["embed_dim"]),
            preprocessing=_preprocessing(config.get("preprocess_cfg", {}), model.visual.image_size),
            config={"model_cfg": model_cfg},
            weights_sha256=hash_weights([weights]),
            text_tower=tower,
            logit_scale=float(model.logit_scale.detach().exp().reshape(())),
        )
        self.visual = model.visual
        self.freeze()

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, D_e), not normalised."""
        features: Tensor = self.visual(pixels)
        return features


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model_cfg = config["model_cfg"]
        _ = model_cfg["embed_dim"], model_cfg["vision_cfg"], model_cfg["text_cfg"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not an open_clip configuration ({type(error).__name__}: {error}). Expected model_cfg with"
            " embed_dim, vision_cfg and text_cfg, as open_clip's hub repositories have."
        ) from error
    if "multimodal_cfg" in model_cfg:
        raise InputError(f"{path}: a CoCa model (multimodal_cfg). Expected a CLIP with an image and a text tower.")
    return config


def _find_weights(folder: Path) -> Path:
    for name in _WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".safetensors"}))
    raise InputError(
        f"{folder}: no weights of open_clip. Looked for {', '.join(_WEIGHT_NAMES)}; found {found or 'none'}. Place"
        " one there, or fetch the repository with `ctx-distill weights fetch`."
    )


def _build_model(folder: Path, model_cfg: dict[str, Any]) -> tuple[Any, bool]:
    """An open_clip model with random weights and its text tower under `.text`, without asking the hub for weights."""
    from open_clip.model import CustomTextCLIP

    cfg = copy.deepcopy(model_cfg)
    cfg.pop("custom_text", None)
    cfg["vision_cfg"].pop("timm_model_pretrained", None)
    if cfg["text_cfg"].get("hf_model_name"):
        place = find_text_config(folder, cfg["text_cfg"]["hf_model_name"])
        from ctx_distill.models.weights import refuse_remote_code

        refuse_remote_code(place)
        cfg["text_cfg"].update(hf_model_name=str(place), hf_model_pretrained=False)
    for old, new in (("proj", "hf_proj_type"), ("pooler_type", "hf_pooler_type")):  # names of open_clip 2.20 and older
        if old in cfg["text_cfg"]:
            cfg["text_cfg"][new] = cfg["text_cfg"].pop(old)
    try:
        return CustomTextCLIP(**cfg), bool(cfg.get("quick_gelu", False))
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise InputError(
            f"{folder / CONFIG_FILE}: open_clip cannot build this model ({type(error).__name__}: {error})."
            " Check model_cfg against the installed open_clip."
        ) from error


def _load_weights(model: nn.Module, path: Path) -> None:
    from open_clip.factory import load_checkpoint

    try:
        load_checkpoint(model, str(path), strict=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: a pickle of more than tensors, which is never loaded here. Save its state dict as"
            f" {WEIGHTS_FILE} on a machine where you trust it."
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: does not fit {path.parent / CONFIG_FILE}: {str(error)[:400]}") from error


def _preprocessing(cfg: dict[str, Any], image_size: Any) -> ImagePreprocessing:
    values = {**_PREPROCESS_DEFAULTS, **{key: value for key, value in cfg.items() if value is not None}}
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if values["interpolation"] == "bilinear" else "bicubic"
    return ImagePreprocessing(
        size=(int(size[0]), int(size[1])),
        mean=tuple(float(v) for v in values["mean"]),
        std=tuple(float(v) for v in values["std"]),
        interpolation=interpolation,
        resize=values["resize_mode"],
        fill=float(values["fill_color"]) / 255,
    )


def expert_preprocessing(config: dict[str, Any]) -> Callable[[NDArray[np.float32]], Tensor]:
    """The preprocessing of a configuration that `make_expert_folder` gave: a radiograph (H, W) to (C, h, w)."""
    prepare = _preprocessing(config["preprocess_cfg"], config["model_cfg"]["vision_cfg"]["image_size"])
    return lambda image: prepare.apply(torch.as_tensor(image, dtype=torch.float32)[None])[0]


def make_expert_folder(
    out: Path,
    texts: Sequence[str],
    image_size: int = 96,
    embed_dim: int = 128,
    vision: Literal["regnet", "resnet", "resnet50", "vit"] | dict[str, Any] = "resnet",
    text_width: int = 128,
    text_layers: int = 2,
    context_length: int = 64,
    vocab_size: int = 2000,
    mean: float = 0.5,
    std: float = 0.25,
    seed: int = 0,
) -> tuple[Any, Any, dict[str, Any]]:
    """An untrained expert of the demo's size, saved as an open_clip folder.

    The text tower is open_clip's own transformer, bidirectional, with its class token behind the text
    (`embed_cls`): that is the only setting in which open_clip masks the padding of a bidirectional tower.

    Args:
        out: folder to write (configuration, random weights, tokenizer); train the model, then `save_expert_folder`.
        texts: reports that the WordPiece vocabulary is trained on.
        image_size: height and width of the input in pixels.
        embed_dim: D_e, of image and text.
        vision: `regnet` (timm regnety_002), `resnet` (CLIP's ResNet, one block a stage, 16 channels wide), `resnet50`
            (CLIP's own), `vit`
            (patches of 1/8 of the image), or open_clip's vision_cfg.
        text_width: width of the text transformer, a multiple of 32.
        text_layers: its layers.
        context_length: its longest text in tokens; longer reports are embedded in chunks.
        vocab_size: of the tokenizer.
        mean: of the radiographs' intensities in [0, 1].
        std: of the same.
        seed: of the weights.

    Returns:
        The trainable open_clip model (`encode_image(pixels, normalize=True)`, `encode_text(ids, normalize=True)`,
        `logit_scale`), a callable tokenizer (texts to ids (B, context_length)), and the folder's configuration.
    """
    from open_clip.tokenizer import HFTokenizer

    from ctx_distill.text.tokenizer import train_wordpiece

    tokenizer = train_wordpiece(texts, vocab_size, out, context_length)
    presets: dict[str, dict[str, Any]] = {
        "regnet": {"timm_model_name": "regnety_002", "timm_pool": "avg", "timm_proj": "linear"},
        "resnet": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "patch_size": None},
        "resnet50": {"layers": [3, 4, 6, 3], "width": 64, "head_width": 64, "patch_size": None},
        "vit": {"layers": 4, "width": 128, "head_width": 32, "patch_size": image_size // 8, "pool_type": "avg"},
    }
    vision_cfg = {"image_size": image_size, **(presets[vision] if isinstance(vision, str) else vision)}
    config: dict[str, Any] = {
        "model_cfg": {
            "embed_dim": embed_dim,
            "custom_text": True,
            "vision_cfg": vision_cfg,
            "text_cfg": {
                "context_length": context_length,
                "vocab_size": len(tokenizer),
                "hf_tokenizer_name": "wordpiece",
                "width": text_width,
                "heads": text_width // 32,
                "layers": text_layers,
                "embed_cls": True,
                "no_causal_mask": True,
                "pad_id": 0,
            },
        },
        "preprocess_cfg": {
            "mean": [mean] * 3,
            "std": [std] * 3,
            "interpolation": "bilinear",
            "resize_mode": "longest",
            "fill_color": 0,
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _ = _build_model(out, config["model_cfg"])
    save_expert_folder(model, config, tokenizer, out)
    return model, HFTokenizer(str(out), context_length=context_length), config


def save_expert_folder(model: nn.Module, config: dict[str, Any], tokenizer: Any, out: Path) -> None:
    """Write a trained expert so that `open_expert` and `open_clip.create_model("local-dir:OUT")` open it.

    Args:
        model: open_clip's CustomTextCLIP.
        config: as `make_expert_folder` gives it.
        tokenizer: its tokenizer (Hugging Face's, or open_clip's wrapper of one).
        out: folder.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(out))
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    part = out / f".{WEIGHTS_FILE}.part"
    save_file(state, part)
    part.replace(out / WEIGHTS_FILE)
    write_json(out / CONFIG_FILE, config)
    logger.info("expert in %s, tokenizer %s", out, tokenizer_hash(getattr(tokenizer, "tokenizer", tokenizer))[:12])

"""X-ray experts of open_clip: pretrained ones such as BiomedCLIP, and the small one that `make expert` trains."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ctx_distill.files import write_json
from ctx_distill.models.preprocessing import ImagePreprocessing
from ctx_distill.models.text_tower import TextTower, tokenizer_hash, write_tower_config
from ctx_distill.models.weights import OPEN_CLIP_PICKLE, find_text_config, hash_weights
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.types import InputError

logger = logging.getLogger(__name__)

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_WEIGHT_NAMES = (WEIGHTS_FILE, "open_clip_pytorch_model.safetensors", "model.safetensors", OPEN_CLIP_PICKLE)
_PREPROCESS_DEFAULTS: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


class OpenClipTextTower(TextTower):
    """open_clip's own text transformer, or its wrapper of a Hugging Face encoder."""

    def __init__(self, module: nn.Module, embed_dim: int, text_cfg: dict[str, Any], quick_gelu: bool, tokenizer: Any):
        """Take over a built tower.

        Args:
            module: `open_clip.transformer.TextTransformer` or `open_clip.hf_model.HFTextEncoder`.
            embed_dim: D_t.
            text_cfg: open_clip's configuration of it.
            quick_gelu: as in the model's configuration.
            tokenizer: a Hugging Face tokenizer, or open_clip's `SimpleTokenizer`.
        """
        super().__init__()
        self.module = module
        self._text_cfg = dict(text_cfg)
        self._quick_gelu = quick_gelu
        self.tokenizer = tokenizer
        self.output_dim = embed_dim
        self._hugging_face = hasattr(module, "config")
        self.context_length = int(text_cfg.get("context_length", 77))
        self.vocab_size = int(module.vocab_size)
        if self._hugging_face:
            self.hidden_dim = int(module.config.hidden_size)
            self.pad_id = int(module.config.pad_token_id)
            self.bidirectional = not getattr(module.config, "is_decoder", False)
        else:
            self.hidden_dim = int(module.width)
            self.pad_id = int(module.pad_id)
            self.bidirectional = module.attn_mask is None
        self.mask_id = getattr(tokenizer, "mask_token_id", None)

    @classmethod
    def build(cls, config: dict[str, Any], folder: Path) -> OpenClipTextTower:
        """A tower with random weights from what `save_files` wrote."""
        from open_clip.model import _build_text_tower

        text_cfg = dict(config["text_cfg"])
        if text_cfg.get("hf_model_name"):
            text_cfg["hf_model_name"] = str(folder / "text")
        module = _build_text_tower(config["embed_dim"], text_cfg, config["quick_gelu"])
        tokenizer = _open_tokenizer(folder, text_cfg)
        return cls(module, config["embed_dim"], config["text_cfg"], config["quick_gelu"], tokenizer)

    def save_files(self, folder: Path) -> None:
        """Write configuration and tokenizer."""
        text_cfg = {**self._text_cfg, "hf_model_pretrained": False}
        if self._hugging_face:
            text_cfg["hf_model_name"] = "text"
            self.module.config.save_pretrained(folder / "text")
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)
            text_cfg["hf_tokenizer_name"] = "."
        write_tower_config(
            folder,
            {"kind": "open_clip", "embed_dim": self.output_dim, "text_cfg": text_cfg, "quick_gelu": self._quick_gelu},
        )

    def count(self, text: str) -> int:
        """Number of tokens of a text, marks included, without truncation."""
        if hasattr(self.tokenizer, "encode") and not hasattr(self.tokenizer, "backend_tokenizer"):
            return len(self.tokenizer.encode(text)) + 2
        return super().count(text)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, L), cut at the context length; L is the context length except where padding is masked out."""
        if hasattr(self.tokenizer, "backend_tokenizer"):
            out = self.tokenizer(
                [" ".join(text.split()) for text in texts], max_length=self.context_length, truncation=True,
                padding="longest" if self._hugging_face else "max_length", return_tensors="pt",
            )  # fmt: skip
            ids: Tensor = out["input_ids"]
        else:
            ids = self.tokenizer(list(texts), context_length=self.context_length)
        return ids.to(self.device)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Token states (B, L, W) of token ids (B, L)."""
        if self._hugging_face:
            mask = (input_ids != self.pad_id).long()
            states: Tensor = self.module.transformer(input_ids=input_ids, attention_mask=mask).last_hidden_state
            return states
        length = input_ids.shape[1]  # learned positions, and the class token after the last of them: pad to the full
        if length < self.context_length:
            input_ids = nn.functional.pad(input_ids, (0, self.context_length - length), value=self.pad_id)
        before = self.module.output_tokens
        self.module.output_tokens = True
        try:
            _, states = self.module(input_ids)
        finally:
            self.module.output_tokens = before
        return states[:, :length]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings (B, D_t), not normalised, of token ids (B, L)."""
        features: Tensor = self.module(input_ids)
        return features


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
            model.text, model_cfg["embed_dim"], text_cfg, quick_gelu, _open_tokenizer(folder, text_cfg)
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
        from ctx_distill.models.xray_expert import refuse_remote_code

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


def _open_tokenizer(folder: Path, text_cfg: dict[str, Any]) -> Any:
    name = text_cfg.get("hf_tokenizer_name")
    files = (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file()
    if not name and not files:
        from open_clip.tokenizer import SimpleTokenizer

        return SimpleTokenizer(context_length=int(text_cfg.get("context_length", 77)))
    from transformers import AutoTokenizer

    mode = text_cfg.get("tokenizer_mode")
    if mode:
        raise InputError(f"{folder / CONFIG_FILE}: tokenizer_mode {mode!r} is not supported; expected none.")
    places = [folder] if files else [folder / name, folder / name.split("/")[-1]]
    place = next((p for p in places if (p / "tokenizer.json").is_file() or (p / "vocab.txt").is_file()), None)
    try:
        return AutoTokenizer.from_pretrained(str(place) if place else name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: no tokenizer. Looked for tokenizer.json or vocab.txt here and in {name!r}, and in the cache of"
            f" huggingface_hub ({str(error).splitlines()[0]}). Place tokenizer.json and tokenizer_config.json in the"
            " folder, or fetch the repository with `ctx-distill weights fetch`."
        ) from error


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


def make_expert_folder(
    out: Path,
    texts: Sequence[str],
    image_size: int = 96,
    embed_dim: int = 128,
    vision: Literal["regnet", "resnet", "vit"] | dict[str, Any] = "resnet",
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
        vision: `regnet` (timm regnety_002), `resnet` (CLIP's ResNet, one block a stage, 16 channels wide), `vit`
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

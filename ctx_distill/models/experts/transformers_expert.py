"""X-ray experts of transformers: SigLIP and CLIP (MedSigLIP) with text, and image encoders alone (RAD-DINO)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ctx_distill.models.preprocessing import ImagePreprocessing
from ctx_distill.models.text_tower import TextTower, write_tower_config
from ctx_distill.models.weights import hash_weights
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.types import InputError

TWO_TOWERS = ("siglip", "clip")
IMAGE_ONLY = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "vit_mae", "deit", "beit", "convnext", "swin")
_PLACE_DEPENDENT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


class TransformersTextTower(TextTower):
    """The text tower of SigLIP (last token through a linear head, padded to the full) or of CLIP (end token)."""

    def __init__(self, kind: str, text_model: nn.Module, projection: nn.Module, output_dim: int, tokenizer: Any):
        """Take over a built tower.

        Args:
            kind: siglip or clip.
            text_model: `SiglipTextModel` or `CLIPTextModel`.
            projection: from its pooled output to the embedding; identity for SigLIP.
            output_dim: D_t.
            tokenizer: Hugging Face tokenizer.
        """
        super().__init__()
        self._kind = kind
        self.text_model = text_model
        self.projection = projection
        self.tokenizer = tokenizer
        self.output_dim = output_dim
        config: Any = text_model.config
        self.hidden_dim = int(config.hidden_size)
        self.context_length = int(config.max_position_embeddings)
        self.vocab_size = int(config.vocab_size)
        self.bidirectional = kind == "siglip"
        self.pad_id = int(tokenizer.pad_token_id)
        self.mask_id = tokenizer.mask_token_id

    @classmethod
    def build(cls, config: dict[str, Any], folder: Path) -> TransformersTextTower:
        """A tower with random weights from what `save_files` wrote."""
        from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, SiglipTextConfig, SiglipTextModel

        text_model: nn.Module
        projection: nn.Module
        if config["kind"] == "siglip":
            text_model, projection = SiglipTextModel(SiglipTextConfig(**config["text_config"])), nn.Identity()
        else:
            text_config = CLIPTextConfig(**config["text_config"])
            text_model = CLIPTextModel(text_config)
            projection = nn.Linear(text_config.hidden_size, config["output_dim"], bias=False)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        return cls(config["kind"], text_model, projection, config["output_dim"], tokenizer)

    def save_files(self, folder: Path) -> None:
        """Write configuration and tokenizer."""
        self.tokenizer.save_pretrained(folder)
        config: Any = self.text_model.config
        write_tower_config(
            folder, {"kind": self._kind, "output_dim": self.output_dim, "text_config": _plain(config.to_dict())}
        )

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, L); L is the context length, as these towers were trained."""
        out = self.tokenizer(
            list(texts), max_length=self.context_length, truncation=True, padding="max_length", return_tensors="pt"
        )
        ids: Tensor = out["input_ids"]
        return ids.to(self.device)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Token states (B, L, W) of token ids (B, L)."""
        states: Tensor = self.text_model(input_ids=input_ids).last_hidden_state
        return states

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings (B, D_t), not normalised, of token ids (B, L)."""
        features: Tensor = self.projection(self.text_model(input_ids=input_ids).pooler_output)
        return features


class TransformersExpert(XrayExpert):
    """A folder that `save_pretrained` wrote, or a snapshot of a hub repository; weights as safetensors only."""

    kind = "transformers"

    def __init__(self, folder: Path) -> None:
        """Read configuration, weights, image processor and tokenizer.

        Raises:
            InputError: one is missing or does not fit, or the architecture is not one of those known here.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config.get("model_type")
        if model_type not in (*TWO_TOWERS, *IMAGE_ONLY):
            raise InputError(
                f"{folder / 'config.json'}: model_type {model_type!r}, expected one of"
                f" {', '.join((*TWO_TOWERS, *IMAGE_ONLY))}."
            )
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            pickles = ", ".join(path.name for path in sorted(folder.glob("*.bin"))) or "none"
            raise InputError(
                f"{folder}: no weights. Looked for model.safetensors; pickled weights found: {pickles} (these are never"
                " loaded). Save the model as safetensors, or fetch a revision that has them."
            )
        model = _load_model(folder)
        image_config: Any = getattr(model.config, "vision_config", model.config)
        tower, logit_scale, embed_dim = None, None, int(getattr(image_config, "hidden_size", 0) or _width(image_config))
        if model_type in TWO_TOWERS:
            tower = _text_tower(model_type, model, folder)
            logit_scale = float(model.logit_scale.detach().exp().reshape(()))
            embed_dim = tower.output_dim if model_type == "clip" else embed_dim
        super().__init__(
            folder,
            embed_dim=embed_dim,
            preprocessing=read_image_processor(folder, image_config),
            config=_plain(config),
            weights_sha256=hash_weights(weights),
            text_tower=tower,
            logit_scale=logit_scale,
        )
        two = model_type in TWO_TOWERS
        self.vision = model.vision_model if two else model
        self.projection = model.visual_projection if model_type == "clip" else nn.Identity()
        self.freeze()

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, D_e), not normalised: the pooled output where the model has one, else its first token."""
        out = self.vision(pixel_values=pixels)
        pooled = getattr(out, "pooler_output", None)
        features: Tensor = self.projection(out.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1))
        return features


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what depends on where or with which release it was written."""
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _PLACE_DEPENDENT
    }


def _width(config: Any) -> int:
    widths = getattr(config, "hidden_sizes", None)
    return int(widths[-1]) if widths else int(config.embed_dim * 2 ** (len(config.depths) - 1))


def _load_model(folder: Path) -> Any:
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: transformers cannot open it ({str(error)[:300]}).") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise InputError(
            f"{folder}: its weights lack {len(missing)} tensors of {type(model).__name__} ({', '.join(missing[:3])})."
            " Use the config.json that they were saved with."
        )
    if info["missing_keys"]:
        model.pooler = None  # random otherwise; the first token is the embedding
    return model


def _text_tower(model_type: str, model: Any, folder: Path) -> TransformersTextTower:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{folder}: no tokenizer for its text tower ({str(error).splitlines()[0]}). Looked for tokenizer.json (and"
            " tokenizer_config.json). Place them there, or fetch the repository with `ctx-distill weights fetch`."
        ) from error
    if model_type == "siglip":
        size = int(getattr(model.config.text_config, "projection_size", None) or model.config.text_config.hidden_size)
        return TransformersTextTower(model_type, model.text_model, nn.Identity(), size, tokenizer)
    return TransformersTextTower(
        model_type, model.text_model, model.text_projection, int(model.config.projection_dim), tokenizer
    )


def read_image_processor(folder: Path, image_config: Any = None) -> ImagePreprocessing:
    """The rule in `preprocessor_config.json` (or `processor_config.json`) of transformers.

    Args:
        folder: where it lies.
        image_config: configuration of the image tower; its `image_size` stands in where the rule names no size.

    Raises:
        InputError: there is none, or it is of a form that is not known here.
    """
    path = next((folder / n for n in ("preprocessor_config.json", "processor_config.json") if (folder / n).is_file()),
                None)  # fmt: skip
    if path is None:
        raise InputError(
            f"{folder}: no preprocessor_config.json, so it is not known how a radiograph becomes this model's input."
            " Place the one that the weights were published with."
        )
    rule = json.loads(path.read_text(encoding="utf-8"))
    rule = rule.get("image_processor", rule)
    size = rule.get("size") or getattr(image_config, "image_size", None)
    size = {"shortest_edge": size} if isinstance(size, int) and rule.get("do_center_crop") else size
    size = {"height": size, "width": size} if isinstance(size, int) else size
    crop = rule.get("crop_size") or {}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if not isinstance(size, dict) or not ("shortest_edge" in size or {"height", "width"} <= size.keys()):
        raise InputError(f"{path}: size is {size!r}, expected shortest_edge, or height and width.")
    factor = float(rule.get("rescale_factor") or 1 / 255) * 255
    mean = [float(v) / factor for v in rule.get("image_mean") or [0.0] * 3]
    std = [float(v) / factor for v in rule.get("image_std") or [1.0] * 3]
    if not rule.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0 / factor] * 3
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if rule.get("resample") == 2 else "bicubic"
    if "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        target = (int(crop.get("height", edge)), int(crop.get("width", edge)))
        return ImagePreprocessing(target, tuple(mean), tuple(std), interpolation, "shortest", short_edge=edge)
    if rule.get("do_center_crop") and crop and (crop["height"], crop["width"]) != (size["height"], size["width"]):
        raise InputError(
            f"{path}: resizes to {size} and then crops to {crop}; expected a crop only after shortest_edge."
        )
    target = (int(size["height"]), int(size["width"]))
    return ImagePreprocessing(target, tuple(mean), tuple(std), interpolation, "squash")

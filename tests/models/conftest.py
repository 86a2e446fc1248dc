"""Small experts in the formats of the public ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ctx_distill.text.tokenizer import train_wordpiece

REPORTS = [
    "The heart is enlarged. There is a small left pleural effusion.",
    "There is a small ground-glass nodule in the right upper lobe, 8.5 mm.",
    "The lungs are clear. No pneumothorax. No pleural effusion. The heart is of normal size.",
    "Opacity in the left lower lobe, which may be pneumonia. Aorta is calcified.",
]


@pytest.fixture(scope="session")
def reports() -> list[str]:
    """Four short reports."""
    return list(REPORTS)


@pytest.fixture(scope="session")
def small_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's kind of expert, untrained: open_clip's own transformer and a WordPiece tokenizer."""
    from ctx_distill.models.experts.open_clip_expert import make_expert_folder

    out = tmp_path_factory.mktemp("experts") / "small"
    make_expert_folder(
        out, REPORTS * 4, image_size=32, embed_dim=24, vision="vit", text_width=32, text_layers=1, context_length=24,
        vocab_size=200, seed=3,
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def biomedclip_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BiomedCLIP's format: timm image tower, a BERT named by its hub repository, its config in a sub-folder."""
    from open_clip.model import CustomTextCLIP
    from transformers import BertConfig

    out = tmp_path_factory.mktemp("experts") / "biomed"
    tokenizer = train_wordpiece(REPORTS * 4, 200, out, 48)
    BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    ).save_pretrained(out / "TinyBERT")  # fmt: skip
    model_cfg: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "",
                       "timm_proj": "linear", "image_size": 160},
        "text_cfg": {"hf_model_name": "someone/TinyBERT", "hf_tokenizer_name": "someone/TinyBERT",
                     "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 48},
    }  # fmt: skip
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}}
    (out / "open_clip_config.json").write_text(json.dumps(config))
    built = json.loads(json.dumps(model_cfg))
    built["text_cfg"].update(hf_model_name=str(out / "TinyBERT"), hf_model_pretrained=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(CustomTextCLIP(**built).state_dict(), out / "open_clip_pytorch_model.bin")
    (out / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    return out

"""transformers experts: RAD-DINO's and MedSigLIP's formats, against the library's own forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ctx_distill.models.opening import open_expert
from ctx_distill.text.tokenizer import train_wordpiece
from ctx_distill.types import InputError


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    out = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(out)
    BitImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.5307] * 3,
        image_std=[0.2583] * 3,
    ).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory, reports: list[str]) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    out = tmp_path_factory.mktemp("siglip")
    tokenizer = train_wordpiece(reports, 200, out, 32)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "pad_token_id": 0},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
    )
    SiglipModel(config).save_pretrained(out)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(out)
    return out


def test_rad_dino_format(dino: Path) -> None:
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained(str(dino)).eval()
    expert = open_expert(str(dino))
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.allclose(
        expert.encode_image(pixels), F.normalize(theirs(pixels).last_hidden_state[:, 0], dim=-1), atol=1e-6
    )
    assert (expert.embed_dim, expert.text_dim, expert.has_text, expert.logit_scale) == (24, None, False, None)
    assert expert.preprocessing.mean == pytest.approx((0.5307,) * 3)
    assert expert.preprocess(torch.rand(50, 40).numpy()).shape == (3, 28, 28)
    with pytest.raises(InputError, match="has no text tower"):
        expert.encode_text(["x"])


def test_medsiglip_format(siglip: Path, reports: list[str]) -> None:
    from transformers import AutoModel, AutoTokenizer

    theirs = AutoModel.from_pretrained(str(siglip)).eval()
    ids = AutoTokenizer.from_pretrained(str(siglip))(
        reports, padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    )["input_ids"]
    pixels = torch.randn(4, 3, 32, 32)
    out = theirs(input_ids=ids, pixel_values=pixels)
    expert = open_expert(str(siglip))
    fits = [i for i, text in enumerate(reports) if expert.text_tower.count(text) <= 32]
    assert fits
    assert torch.allclose(expert.encode_image(pixels), out.image_embeds, atol=1e-6)
    assert torch.allclose(expert.encode_text([reports[i] for i in fits]), out.text_embeds[fits], atol=1e-6)
    assert expert.logit_scale == pytest.approx(theirs.logit_scale.exp().item())
    assert expert.text_tower.bidirectional
    assert not any(p.requires_grad for p in expert.parameters())
    assert not expert.train().text_tower.training


def test_clip_format(tmp_path: Path, reports: list[str]) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = train_wordpiece(reports, 200, tmp_path, 32)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": 3,
                     "pad_token_id": 0, "bos_token_id": 2},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )  # fmt: skip
    theirs = CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    ids = tokenizer(reports[:1], padding="max_length", max_length=32, return_tensors="pt")["input_ids"]
    pixels = torch.randn(1, 3, 32, 32)
    out = theirs(input_ids=ids, pixel_values=pixels)
    expert = open_expert(str(tmp_path))
    assert (expert.embed_dim, expert.text_dim) == (12, 12)
    assert torch.allclose(expert.encode_image(pixels), out.image_embeds, atol=1e-6)
    assert torch.allclose(expert.encode_text(reports[:1]), out.text_embeds, atol=1e-6)
    assert not expert.text_tower.bidirectional


def test_fingerprints(dino: Path, siglip: Path, tmp_path: Path) -> None:
    assert open_expert(str(dino)).fingerprint() != open_expert(str(siglip)).fingerprint()
    moved = shutil.copytree(siglip, tmp_path / "elsewhere")
    assert open_expert(str(moved)).fingerprint() == open_expert(str(siglip)).fingerprint()
    from safetensors.torch import load_file, save_file

    tensors = load_file(moved / "model.safetensors")
    tensors["logit_scale"] += 1
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    assert open_expert(str(moved)).fingerprint() != open_expert(str(siglip)).fingerprint()


def test_refusals(dino: Path, siglip: Path, tmp_path: Path) -> None:
    def edited(source: Path, **changes: object) -> Path:
        folder = shutil.copytree(source, tmp_path / str(len(list(tmp_path.iterdir()))))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    with pytest.raises(InputError, match=r"auto_map.*trust_remote_code is never set"):
        open_expert(str(edited(dino, auto_map={"AutoModel": "modeling.Evil"})))
    with pytest.raises(InputError, match="model_type 'gpt2', expected one of siglip"):
        open_expert(str(edited(dino, model_type="gpt2")))
    with pytest.raises(InputError, match=r"lack \d+ tensors of Dinov2Model"):
        open_expert(str(edited(dino, num_hidden_layers=2)))
    folder = edited(dino)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled weights found: pytorch_model\.bin \(these are never loaded\)"):
        open_expert(str(folder))
    folder = edited(dino)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
        open_expert(str(folder))
    folder = edited(siglip)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer for its text tower"):
        open_expert(str(folder))

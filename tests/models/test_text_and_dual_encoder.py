"""Text encoders and the dual encoder: embeddings, freezing, and artefacts that stand alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ctx_distill.models.ct_encoder import ResNet3D
from ctx_distill.models.dual_encoder import DualEncoder, load_ct_encoder, save_ct_encoder
from ctx_distill.models.heads import FindingsHead, ProjectionHead
from ctx_distill.models.opening import open_expert
from ctx_distill.models.text_encoder import BertTextEncoder, ExpertTextEncoder, TextEncoder
from ctx_distill.types import InputError

SPEC = {"shape": [16, 16, 16], "spacing": [6.0, 6.0, 6.0]}
KINDS = ["bert", "expert", "expert-hf", "expert-siglip"]


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory, reports: list[str]) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    from ctx_distill.text.tokenizer import train_wordpiece

    out = tmp_path_factory.mktemp("siglip")
    tokenizer = train_wordpiece(reports, 200, out, 32)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "pad_token_id": 0}
    SiglipModel(
        SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16})
    ).save_pretrained(out)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(out)
    return out


@pytest.fixture
def build(small_expert: Path, biomedclip_like: Path, siglip_folder: Path, reports: list[str], tmp_path: Path):
    """Makes a text encoder of a kind; expert folders are copies that the test may delete."""

    def make(kind: str, trainable: bool = True) -> TextEncoder:
        if kind == "bert":
            return BertTextEncoder.from_scratch(reports, tmp_path / "tok", 200, width=32, layers=1, context_length=24)
        source = {"expert": small_expert, "expert-hf": biomedclip_like, "expert-siglip": siglip_folder}[kind]
        copy = shutil.copytree(source, tmp_path / "expert", dirs_exist_ok=True)
        return ExpertTextEncoder.from_expert(str(copy), trainable=trainable)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_token_access(build, kind: str, reports: list[str]) -> None:
    encoder = build(kind).eval()
    long = " ".join(reports)
    features = encoder([*reports, long, ""])
    assert features.shape == (6, encoder.embed_dim)
    assert torch.isfinite(features).all()
    assert torch.allclose(encoder(reports[:1]), features[:1], atol=1e-5)  # whatever else is in the batch
    tokens = encoder.tokens(reports)
    assert tokens.input_ids.shape[1] <= encoder.context_length
    assert encoder.hidden(tokens.input_ids, tokens.attention_mask).shape == (
        *tokens.input_ids.shape,
        encoder.hidden_dim,
    )
    assert encoder.bidirectional
    assert encoder.mask_id == 4
    first = [reports[0][a:b].lower() for a, b in tokens.offsets[0].tolist() if b > a]
    assert "".join(first[:3]).startswith("the")
    assert tokens.special_mask[~tokens.attention_mask].all()
    features.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize("kind", ["expert", "expert-hf"])
def test_the_frozen_tower_equals_the_expert(build, kind: str, reports: list[str], tmp_path: Path) -> None:
    encoder = build(kind, trainable=False).train()
    texts = [*reports, " ".join(reports)]
    expected = open_expert(str(tmp_path / "expert")).encode_text(texts)
    assert torch.allclose(torch.nn.functional.normalize(encoder(texts), dim=-1), expected, atol=1e-6)
    assert not encoder(texts).requires_grad
    assert not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_bert_means_over_real_tokens_only(build, reports: list[str]) -> None:
    encoder = build("bert").eval()
    ids = torch.tensor([encoder.tokenizer(reports[3][:20])["input_ids"]])
    states = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.allclose(encoder([reports[3][:20], reports[1]])[0], states[0].mean(0), atol=1e-5)


def test_bert_from_a_folder(build, tmp_path: Path, reports: list[str]) -> None:
    encoder = build("bert").eval()
    folder = tmp_path / "hf"
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    again = BertTextEncoder.from_pretrained(str(folder), context_length=24).eval()
    assert torch.allclose(again(reports), encoder(reports), atol=1e-6)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"Looked for config\.json, model\.safetensors"):
        BertTextEncoder.from_pretrained(str(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection_dim", [None, 12])
def test_the_dual_encoder_comes_back_from_its_folder_alone(
    build,
    kind: str,
    projection_dim: int | None,
    reports: list[str],
    tmp_path: Path,
) -> None:
    model = DualEncoder(ResNet3D("small", base_width=8), build(kind), projection_dim).eval()
    volume = torch.randn(2, 1, 16, 16, 16)
    image, output = model.encode_volume(volume)
    text = model.encode_text([*reports, " ".join(reports)])
    assert image.shape[1] == text.shape[1] == model.embed_dim == (projection_dim or model.text_encoder.embed_dim)
    assert torch.allclose(image.norm(dim=-1), torch.ones(2))
    assert torch.allclose(text.norm(dim=-1), torch.ones(5))
    assert output.tokens.ndim == 3
    saved = model.save(tmp_path / "artefact", {"ct-encoder": "abc"}, SPEC)
    for name in ("expert", "tok"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    moved = (tmp_path / "artefact").rename(tmp_path / "moved")
    again, artefact = DualEncoder.load(moved)
    assert artefact.fingerprint == saved.fingerprint
    assert artefact.config["volume_spec"] == SPEC
    assert artefact.upstream == {"ct-encoder": "abc"}
    assert torch.equal(again.encode_volume(volume)[0], image)
    assert torch.allclose(again.encode_text([*reports, " ".join(reports)]), text, atol=1e-6)
    assert again.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert not again.training


def test_projection_of_the_distillation_must_lead_into_the_same_space(build) -> None:
    encoder = ResNet3D("small", base_width=8)
    with pytest.raises(InputError, match="the image projection maps 64 to 7; expected 64 to 24"):
        DualEncoder(encoder, build("expert"), image_projection=ProjectionHead(64, 7))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_ct_encoder_artefact(tmp_path: Path, kind: str) -> None:
    encoder, projection = ResNet3D("small", base_width=8).eval(), ProjectionHead(64, 24, kind)  # type: ignore[arg-type]
    saved = save_ct_encoder(tmp_path / "a", encoder, projection, {"xray-index": "f"}, SPEC)
    again, head, artefact = load_ct_encoder(tmp_path / "a")
    volume = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(head(again(volume).pooled), projection(encoder(volume).pooled))
    assert (artefact.fingerprint, artefact.config["volume_spec"]) == (saved.fingerprint, SPEC)
    with pytest.raises(InputError, match="contains the artefact ct-encoder; expected dual-encoder"):
        DualEncoder.load(tmp_path / "a")


def test_findings_head_learns_a_linear_rule() -> None:
    torch.manual_seed(0)
    features = torch.randn(200, 64)
    labels = (features[:, :2] > 0).float()
    head = FindingsHead(64, 2)
    assert head(features).shape == (200, 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(head(features), labels).backward()
        optimizer.step()
    assert ((head(features) > 0).float() == labels).float().mean() > 0.95

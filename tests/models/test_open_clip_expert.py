"""open_clip experts: numbers equal to open_clip's own, frozen, chunked reports, fingerprints, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ctx_distill.models.experts.open_clip_expert import make_expert_folder, save_expert_folder
from ctx_distill.models.opening import open_expert
from ctx_distill.types import InputError


def test_the_small_expert_equals_open_clip(small_expert: Path, reports: list[str]) -> None:
    import open_clip

    theirs = open_clip.create_model(f"local-dir:{small_expert}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{small_expert}")(reports)
    expert = open_expert(str(small_expert))
    pixels = torch.randn(3, 3, 32, 32)
    assert torch.allclose(expert.encode_image(pixels), theirs.encode_image(pixels, normalize=True), atol=1e-6)
    short = [text for text in reports if len(expert.text_tower.chunks(text)) == 1]
    assert short
    rows = [reports.index(text) for text in short]
    assert torch.allclose(expert.encode_text(short), theirs.encode_text(ids[rows], normalize=True), atol=1e-6)
    assert expert.logit_scale == pytest.approx(1 / 0.07)
    assert (expert.embed_dim, expert.text_dim, expert.has_text) == (24, 24, True)


def test_padding_does_not_change_a_text(small_expert: Path) -> None:
    """Bidirectional with open_clip's class token: what lies behind the first padding token must not be seen."""
    expert = open_expert(str(small_expert))
    ids = expert.text_tower.tokenize(["The lungs are clear."])
    assert expert.text_tower.bidirectional
    changed = expert.text_tower.module.positional_embedding.detach().clone()
    before = expert.text_tower(ids)
    changed[15:24] += 1.0  # positions of padding only; the last one belongs to the class token
    expert.text_tower.module.positional_embedding.data.copy_(changed)
    assert torch.allclose(before, expert.text_tower(ids), atol=1e-6)


def test_biomedclip_format_equals_open_clip(biomedclip_like: Path, reports: list[str]) -> None:
    from open_clip.factory import load_checkpoint
    from open_clip.model import CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer

    cfg = json.loads((biomedclip_like / "open_clip_config.json").read_text())["model_cfg"]
    cfg["text_cfg"].update(hf_model_name=str(biomedclip_like / "TinyBERT"), hf_model_pretrained=False)
    theirs = CustomTextCLIP(**cfg).eval()
    load_checkpoint(theirs, str(biomedclip_like / "open_clip_pytorch_model.bin"))
    ids = HFTokenizer(str(biomedclip_like), context_length=48)(reports)
    expert = open_expert(str(biomedclip_like))
    pixels = torch.randn(2, 3, 160, 160)
    assert torch.allclose(expert.encode_text(reports), theirs.encode_text(ids, normalize=True), atol=1e-6)
    assert torch.allclose(expert.encode_image(pixels), theirs.encode_image(pixels, normalize=True), atol=1e-6)
    assert expert.license == "mit"
    assert expert.preprocessing.size == (160, 160)


def test_a_clip_with_causal_text_and_byte_pairs(tmp_path: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    save_file(open_clip.model.CLIP(**cfg).state_dict(), tmp_path / "open_clip_model.safetensors")
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    texts = ["pleural effusion is present.", ""]
    ids = open_clip.tokenizer.SimpleTokenizer(context_length=20)(texts)
    expert = open_expert(str(tmp_path))
    assert not expert.text_tower.bidirectional
    assert torch.allclose(expert.encode_text(texts), theirs.encode_text(ids, normalize=True), atol=1e-6)


def test_it_is_frozen_and_stays_in_eval(small_expert: Path) -> None:
    expert = open_expert(str(small_expert))
    wrapped = torch.nn.ModuleDict({"teacher": expert}).train()
    assert not any(module.training for module in wrapped["teacher"].modules())
    assert not any(parameter.requires_grad for parameter in expert.parameters())
    assert not expert.encode_image(torch.randn(1, 3, 32, 32)).requires_grad


def test_long_reports_are_split_and_averaged(small_expert: Path, reports: list[str]) -> None:
    expert = open_expert(str(small_expert))
    tower = expert.text_tower
    long = " ".join(reports)
    chunks = tower.chunks(long)
    assert len(chunks) > 2
    assert all(tower.count(chunk) <= tower.context_length for chunk in chunks)
    assert " ".join(chunks).split() == long.split()
    mean = expert.encode_text(chunks).mean(0)
    assert torch.allclose(expert.encode_text([long, "x"])[0], mean / mean.norm(), atol=1e-6)
    assert torch.allclose(
        expert.encode_text([long, *reports], batch_size=2), expert.encode_text([long, *reports]), atol=1e-6
    )
    empty = expert.encode_text([""])
    assert empty.norm() == pytest.approx(1.0, abs=1e-5)
    assert expert.encode_text([]).shape == (0, 24)


def test_fingerprint_depends_on_content_not_place(small_expert: Path, tmp_path: Path) -> None:
    expert = open_expert(str(small_expert))
    expert.encode_text(["a text"])  # padding state of the tokenizer must not enter
    moved = shutil.copytree(small_expert, tmp_path / "moved")
    assert open_expert(str(moved)).fingerprint() == expert.fingerprint()
    described = expert.describe()
    assert json.loads(json.dumps(described)) == described
    config = json.loads((moved / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.1] * 3
    (moved / "open_clip_config.json").write_text(json.dumps(config))
    assert open_expert(str(moved)).fingerprint() != expert.fingerprint()


def test_saving_a_trained_expert(tmp_path: Path, reports: list[str]) -> None:
    model, tokenizer, config = make_expert_folder(
        tmp_path, reports, image_size=32, embed_dim=8, vision="resnet", text_width=32, text_layers=1, context_length=16
    )
    untrained = open_expert(str(tmp_path)).fingerprint()
    assert tokenizer(reports).shape == (4, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = -(model.encode_image(torch.randn(4, 3, 32, 32)) * model.encode_text(tokenizer(reports))).sum()
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "logit_scale")
    optimizer.step()
    save_expert_folder(model, config, tokenizer, tmp_path)
    expert = open_expert(str(tmp_path))
    assert expert.fingerprint() != untrained
    pixels = expert.preprocess(np.random.default_rng(0).random((40, 30), dtype=np.float32))[None]
    assert torch.allclose(expert.encode_image(pixels), model.eval().encode_image(pixels, normalize=True), atol=1e-6)


def test_the_seed_decides_the_weights(tmp_path: Path, reports: list[str]) -> None:
    kwargs = {"image_size": 32, "embed_dim": 8, "vision": "vit", "text_width": 32, "text_layers": 1}
    state = torch.random.get_rng_state()
    prints = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_expert_folder(tmp_path / name, reports, seed=seed, **kwargs)
        prints.append(open_expert(str(tmp_path / name)).fingerprint())
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_refusals_say_what_is_missing(small_expert: Path, biomedclip_like: Path, tmp_path: Path) -> None:
    def broken(source: Path) -> Path:
        return shutil.copytree(source, tmp_path / str(len(list(tmp_path.iterdir()))))

    folder = broken(small_expert)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights of open_clip. Looked for open_clip_model.safetensors"):
        open_expert(str(folder))
    folder = broken(small_expert)
    (folder / "open_clip_config.json").write_text('{"model_cfg": {}}')
    with pytest.raises(InputError, match="not an open_clip configuration"):
        open_expert(str(folder))
    folder = broken(small_expert)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 48
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not fit"):
        open_expert(str(folder))
    folder = broken(biomedclip_like)
    shutil.rmtree(folder / "TinyBERT")
    with pytest.raises(InputError, match=r"someone/TinyBERT.*config\.json.*revision main.*Place it at .*weights fetch"):
        open_expert(str(folder))
    folder = broken(biomedclip_like)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\. Looked for tokenizer\.json"):
        open_expert(str(folder))
    folder = broken(biomedclip_like)
    torch.save(torch.nn.Linear(2, 2), folder / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="a pickle of more than tensors"):
        open_expert(str(folder))
    with pytest.raises(InputError, match=r"shape \(1, 8, 8\); expected \(3, 32, 32\)"):
        open_expert(str(small_expert)).encode_image(torch.zeros(1, 1, 8, 8))

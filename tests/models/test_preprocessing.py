"""Preprocessing against the libraries' own pipelines on bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctx_distill.models.experts.open_clip_expert import _preprocessing
from ctx_distill.models.experts.transformers_expert import read_image_processor
from ctx_distill.models.preprocessing import ImagePreprocessing
from ctx_distill.types import InputError


def film(height: int, width: int) -> np.ndarray:
    """A radiograph with edges, at byte precision, so that only resampling differs."""
    y, x = np.mgrid[:height, :width]
    image = 0.5 + 0.15 * np.sin(x / 7.0) + 0.1 * np.cos(y / 11.0)
    image[height // 4 : height // 2, width // 3 : width // 2] = 0.8  # far from 1: Pillow clips overshoot in each pass
    return (np.round(np.clip(image, 0, 1) * 255) / 255).astype(np.float32)


def as_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(image * 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("shape", [(120, 90), (77, 140), (64, 64), (30, 41)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_agrees_with_open_clip(shape: tuple[int, int], mode: str, interpolation: str) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "interpolation": interpolation, "resize_mode": mode}
    image = film(*shape)
    theirs = image_transform_v2(PreprocessCfg(size=48, **cfg), is_train=False)(as_pil(image))
    ours = _preprocessing(cfg, 48).apply(torch.from_numpy(image)[None])[0]
    assert ours.shape == theirs.shape == (3, 48, 48)
    difference = (ours - theirs).abs() * torch.tensor(cfg["std"])[:, None, None] * 255
    assert difference.max() < 2.5  # Pillow rounds to bytes after each of its two passes
    assert difference.mean() < 0.8


@pytest.mark.parametrize("shape", [(120, 90), (77, 140)])
@pytest.mark.parametrize("crop", [True, False])
def test_agrees_with_transformers(tmp_path: Path, shape: tuple[int, int], crop: bool) -> None:
    from transformers import BitImageProcessor, SiglipImageProcessor

    if crop:  # RAD-DINO's
        processor = BitImageProcessor(
            size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}, resample=3,
            image_mean=[0.5307] * 3, image_std=[0.2583] * 3,
        )  # fmt: skip
    else:  # SigLIP's
        processor = SiglipImageProcessor(size={"height": 40, "width": 40}, resample=2)
    processor.save_pretrained(tmp_path)
    image = film(*shape)
    theirs = torch.as_tensor(np.asarray(processor(images=as_pil(image))["pixel_values"][0]))
    rule = read_image_processor(tmp_path)
    ours = rule.apply(torch.from_numpy(image)[None])[0]
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs() * rule.std[0] * 255).mean() < 1.0


def test_torchxrayvision_range() -> None:
    rule = ImagePreprocessing((8, 8), (0.5,), (1 / 2048,), "bilinear", "crop-square")
    assert rule.apply(torch.zeros(1, 12, 20)).unique().tolist() == [-1024.0]
    assert rule.apply(torch.ones(1, 12, 20)).unique().tolist() == [1024.0]
    image = torch.zeros(1, 10, 20)
    image[:, :, 5:15] = 1.0  # exactly the central square, so nothing outside it may leak in
    assert rule.apply(image).min() > 1023.9


def test_batch_and_errors() -> None:
    rule = ImagePreprocessing((8, 6), (0.5,), (0.5,), "bilinear", "shortest")
    images = torch.rand(3, 20, 33)
    assert torch.allclose(rule.apply(images)[1], rule.apply(images[1:2])[0])
    with pytest.raises(InputError, match=r"expected \(B, H, W\)"):
        rule.apply(torch.rand(1, 3, 20, 20))

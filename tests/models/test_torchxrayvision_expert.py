"""torchxrayvision's format: converted without running the pickle, same features as the pickled module."""

from __future__ import annotations

import hashlib
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctx_distill.models.convert_torchxrayvision import XRV_ALL_SHA256, convert_torchxrayvision
from ctx_distill.models.opening import open_expert
from ctx_distill.types import InputError

BLOCKS, GROWTH, INITIAL = (2, 1, 1, 1), 4, 8


class _Layer(nn.Sequential):
    """The package's dense layer, written out again, so that the adapter is checked against another path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_module("norm1", nn.BatchNorm2d(width))
        self.add_module("relu1", nn.ReLU())
        self.add_module("conv1", nn.Conv2d(width, 4 * GROWTH, 1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(4 * GROWTH))
        self.add_module("relu2", nn.ReLU())
        self.add_module("conv2", nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, super().forward(x)], 1)


class _DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(1, INITIAL, 7, 2, 3, bias=False),
            norm0=nn.BatchNorm2d(INITIAL),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, 2, 1),
        )
        width = INITIAL
        for index, layers in enumerate(BLOCKS, start=1):
            block = nn.Sequential(
                OrderedDict((f"denselayer{i + 1}", _Layer(width + i * GROWTH)) for i in range(layers))
            )
            parts[f"denseblock{index}"] = block
            width += layers * GROWTH
            if index < len(BLOCKS):
                parts[f"transition{index}"] = nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(width),
                        relu=nn.ReLU(),
                        conv=nn.Conv2d(width, width // 2, 1, bias=False),
                        pool=nn.AvgPool2d(2, 2),
                    )
                )
                width //= 2
        parts["norm5"] = nn.BatchNorm2d(width)
        self.features = nn.Sequential(parts)
        self.classifier = nn.Linear(width, 18)
        self.op_threshs = None

    def features2(self, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(F.relu(self.features(x)), (1, 1)).flatten(1)


@pytest.fixture
def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """A whole module pickled under torchxrayvision's name in the old file format, which is gone when it is read."""
    package = types.ModuleType("torchxrayvision_gone")
    package._DenseNet, package._Layer = _DenseNet, _Layer  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchxrayvision_gone", package)
        for cls in (_DenseNet, _Layer):
            patch.setattr(cls, "__module__", "torchxrayvision_gone")
        torch.manual_seed(0)
        model = _DenseNet()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        path = tmp_path / "xrv.pt"
        torch.save(model, path, _use_new_zipfile_serialization=False)
    return path, model.eval()


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_converted_features_equal_the_module(pickled: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = pickled
    out = convert_torchxrayvision(path, tmp_path / "out", sha(path))
    expert = open_expert(str(out))
    pixels = torch.rand(2, 1, 224, 224) * 2048 - 1024
    assert torch.allclose(expert.encode_image(pixels), F.normalize(model.features2(pixels), dim=-1), atol=1e-5)
    assert expert.embed_dim == model.classifier.in_features
    assert (expert.kind, expert.license, expert.has_text) == ("torchxrayvision", "apache-2.0", False)
    assert expert.logit_scale is None
    assert not expert.train().training
    assert not any(module.training for module in expert.modules())
    assert expert.preprocess(torch.rand(300, 200).numpy()).shape == (1, 224, 224)
    with pytest.raises(InputError, match="has no text tower"):
        expert.encode_text(["effusion"])
    assert sorted(p.name for p in out.iterdir()) == ["ctx_distill_source.json", "model.safetensors", "xrv_config.json"]


def test_the_full_architecture_has_the_released_names() -> None:
    """densenet121-res224-all: 1024 features, and torchvision's names for all of them."""
    from torchvision.models import densenet121

    names = densenet121(weights=None).state_dict().keys()
    assert {"features.conv0.weight", "features.denseblock4.denselayer16.conv2.weight", "features.norm5.bias"} <= names
    assert len(XRV_ALL_SHA256) == 64


def test_old_checkpoints_without_batch_counters_load(pickled: tuple[Path, nn.Module], tmp_path: Path) -> None:
    _, model = pickled
    path = tmp_path / "state.pt"
    torch.save({k: v for k, v in model.state_dict().items() if "num_batches" not in k}, path)
    expert = open_expert(str(convert_torchxrayvision(path, tmp_path / "out", sha(path))))
    pixels = torch.rand(1, 1, 224, 224) * 2048 - 1024
    assert torch.allclose(expert.encode_image(pixels), F.normalize(model.features2(pixels), dim=-1), atol=1e-5)


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_a_wrong_checksum_is_refused_unread_and_code_never_runs(tmp_path: Path) -> None:
    struck = tmp_path / "struck"
    path = tmp_path / "bomb.pt"
    for old in (False, True):
        torch.save(_Bomb(struck), path, _use_new_zipfile_serialization=not old)
        with pytest.raises(InputError, match=r"SHA-256 is .* expected 5652"):
            convert_torchxrayvision(path, tmp_path / "out")
        with pytest.raises(InputError, match=r"not a checkpoint|holds a"):
            convert_torchxrayvision(path, tmp_path / "out", sha(path))
        assert not struck.exists()
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        convert_torchxrayvision(tmp_path / "none.pt", tmp_path / "out")
    path = tmp_path / "linear.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(InputError, match=r"holds bias, weight .*expected a torchxrayvision DenseNet"):
        convert_torchxrayvision(path, tmp_path / "out", sha(path))
    (tmp_path / "xrv_config.json").write_text("{}")
    with pytest.raises(InputError, match="Expected image_size, block_config"):
        open_expert(str(tmp_path))

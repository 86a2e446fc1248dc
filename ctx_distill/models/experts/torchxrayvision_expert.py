"""torchxrayvision's DenseNet-121 as an X-ray expert, from converted weights and without the package.

Cohen et al., "TorchXRayVision: A library of chest X-ray datasets and models", MIDL 2022. The package's DenseNet has the
parameter names of torchvision's, with one input channel; its `features2` is features, ReLU, global average pool.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctx_distill.models.preprocessing import ImagePreprocessing
from ctx_distill.models.weights import hash_weights
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.types import InputError


class TorchXrayVisionExpert(XrayExpert):
    """A folder that `convert_torchxrayvision` wrote: 1024-d features of 1 x 224 x 224 in [-1024, 1024], no text."""

    kind = "torchxrayvision"

    def __init__(self, folder: Path) -> None:
        """Read configuration and weights.

        Raises:
            InputError: weights are missing or do not fit.
        """
        from safetensors.torch import load_file
        from torchvision.models import DenseNet

        from ctx_distill.checkpoint import load_weights

        path = folder / "xrv_config.json"
        try:
            config = json.loads(path.read_text())
            size = int(config["image_size"])
            blocks = tuple(int(layers) for layers in config["block_config"])
            net = DenseNet(config["growth_rate"], blocks, config["num_init_features"], config["bn_size"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not readable ({type(error).__name__}: {error}). Expected image_size, block_config,"
                " growth_rate, num_init_features and bn_size, as `ctx-distill weights convert-torchxrayvision` writes them."
            ) from error
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise InputError(
                f"{weights}: not found. Convert the release file of torchxrayvision with `ctx-distill weights convert-torchxrayvision`."
            )
        features: nn.Module = net.features
        features.conv0 = nn.Conv2d(1, config["num_init_features"], kernel_size=7, stride=2, padding=3, bias=False)
        load_weights(features, _with_counters(features, load_file(weights)), "features.", str(weights))
        super().__init__(
            folder,
            embed_dim=int(net.classifier.in_features),
            preprocessing=ImagePreprocessing(
                (size, size), mean=(0.5,), std=(1 / 2048,), interpolation="bilinear", resize="crop-square"
            ),
            config=config,
            weights_sha256=hash_weights([weights]),
        )
        self.features = features
        self.freeze()

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, 1024), not normalised."""
        return F.adaptive_avg_pool2d(F.relu(self.features(pixels)), 1).flatten(1)


def _with_counters(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add batch counters that checkpoints of old PyTorch releases lack; they play no part in eval mode."""
    counters = {f"features.{key}" for key in module.state_dict() if key.endswith("num_batches_tracked")}
    return {**{key: torch.tensor(0) for key in counters}, **tensors}

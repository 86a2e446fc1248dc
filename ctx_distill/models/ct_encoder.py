"""CT encoders based on MONAI that return a pooled vector and a token grid per volume, without batch norm."""

from __future__ import annotations

import importlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctx_distill.models.compute import ComputeSettings
from ctx_distill.types import EncoderOutput, InputError


@dataclass(frozen=True)
class TokenGrid:
    """The positions of tokens in a volume: token (i, j, k) is centred on voxel offset + step * (i, j, k).

    Attributes:
        shape: tokens along D, H, W.
        step: voxels between neighbouring tokens.
        offset: voxel of the first token.
    """

    shape: tuple[int, int, int]
    step: tuple[int, int, int]
    offset: tuple[float, float, float]


class CTEncoder(nn.Module, ABC):
    """Base class of f in h = f(V): (B, 1, D, H, W) to a pooled embedding (B, D_c) and tokens (B, T, D_c).

    Subclasses store their constructor arguments as JSON values in `init_args`, from which the encoder can be built. Compute
    settings (`compute_with`) are not included.

    Attributes:
        embed_dim: D_c.
        init_args: arguments of the constructor.
        convolutional: whether it benefits from `channels_last`.
    """

    embed_dim: int
    init_args: dict[str, Any]
    convolutional = False
    _checkpointing = False
    _channels_last = False

    @abstractmethod
    def forward(self, volume: Tensor) -> EncoderOutput:
        """Encode volumes (B, 1, D, H, W) scaled according to the volume spec; tokens in D, H, W order."""

    def compute_with(self, settings: ComputeSettings, device: torch.device) -> None:
        """Apply compute settings for training, without changing names or values of weights.

        Args:
            settings: see `ComputeSettings`.
            device: device of the encoder in training.
        """
        self._checkpointing = settings.checkpointing
        chosen = settings.channels_last
        if chosen is None:
            chosen = self.convolutional and settings.compile and device.type == "cuda"
        self._channels_last = chosen
        if chosen:
            self.to(memory_format=torch.channels_last_3d)
        if settings.compile:
            self.compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the encoder as set by `compute_with` in training, and never compiled in evaluation."""
        call: Any = super().__call__ if self.training else self._call_impl
        return call(*args, **kwargs)

    def _through(self, block: nn.Module, x: Tensor) -> Tensor:
        """Return the output of a block, with activation checkpointing if enabled."""
        if self._checkpointing and self.training and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(block, x, use_reentrant=False)
            return recomputed
        out: Tensor = block(x)
        return out

    def layers(self) -> list[list[nn.Module]]:
        """Return the modules by depth from the input, for layer-wise learning-rate decay."""
        return [[self]]

    def token_grid(self, shape: tuple[int, int, int]) -> TokenGrid | None:
        """Return token positions in a volume of (D, H, W) voxels, or None if the pooled feature is not their mean."""
        del shape
        return None

    def config(self) -> dict[str, Any]:
        """Return `class_path` and `init_args` as JSON values for `build_ct_encoder`."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": dict(self.init_args)}


def build_ct_encoder(config: Mapping[str, Any]) -> CTEncoder:
    """Build an encoder with random weights from `CTEncoder.config()`.

    Only subclasses of `CTEncoder` from this package or from already imported modules are built, so the configuration of an
    artefact cannot import other code.

    Raises:
        InputError: the class does not exist, is not a `CTEncoder`, or does not accept the arguments.
    """
    path = str(config.get("class_path", ""))
    module_name, _, name = path.rpartition(".")
    if module_name.startswith("ctx_distill."):
        try:
            importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise InputError(f"CT encoder {path!r}: no module {module_name}.") from error
    encoder_class = getattr(sys.modules.get(module_name), name, None)
    if not (isinstance(encoder_class, type) and issubclass(encoder_class, CTEncoder)) or inspect.isabstract(
        encoder_class
    ):
        raise InputError(
            f"CT encoder {path!r}: not a CTEncoder. Expected ctx_distill.models.ct_encoder.ResNet3D or ViT3D, or a"
            " subclass of CTEncoder in an imported module."
        )
    try:
        return encoder_class(**dict(config.get("init_args", {})))
    except TypeError as error:
        raise InputError(f"CT encoder {path}: arguments do not fit ({error}).") from error


def _check_volume(volume: Tensor, name: str) -> None:
    if volume.ndim != 5 or volume.shape[1] != 1:
        raise InputError(f"{name}: volume of shape {tuple(volume.shape)}, expected (B, 1, D, H, W).")


def _group_norm(module: nn.Module, groups: int) -> None:
    """Replace every batch norm by group norm, because MONAI's ResNet applies its `norm` only to the stem."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _group_norm(child, groups)


_RESNETS: dict[str, tuple[str, list[int], int]] = {
    "small": ("basic", [1, 1, 1, 1], 16),
    "resnet10": ("basic", [1, 1, 1, 1], 64),
    "resnet18": ("basic", [2, 2, 2, 2], 64),
    "resnet34": ("basic", [3, 4, 6, 3], 64),
    "resnet50": ("bottleneck", [3, 4, 6, 3], 64),
}


SHALLOW = 7
"""Number of slices below which blocks of a ResNet run in float32 on a CPU.

If a volume has fewer slices than the kernel, oneDNN's bf16 weight gradient of a 3D convolution contains uninitialised memory
(torch 2.11 to 2.15 on processors with AVX-512 BF16).
"""


class ResNet3D(CTEncoder):
    """MONAI's 3D ResNet with group norm (He et al. 2016; Wu and He 2018), mean-pooled.

    The grid is the input divided by stem_stride * (2 with max_pool) * 4 * last_stride along each axis, rounded up.
    """

    convolutional = True

    def __init__(
        self,
        variant: Literal["small", "resnet10", "resnet18", "resnet34", "resnet50"] = "small",
        base_width: int | None = None,
        stem_kernel: int = 7,
        stem_stride: int = 2,
        max_pool: bool = True,
        last_stride: Literal[1, 2] = 1,
        groups: int = 8,
    ) -> None:
        """Build it.

        Args:
            variant: blocks and default width; `small` is for CPUs.
            base_width: channels of the first stage; each later stage has twice as many. None for the variant's.
            stem_kernel: edge of the first convolution, odd.
            stem_stride: its stride.
            max_pool: whether to halve the grid again after the stem.
            last_stride: stride of the last stage; 1 leaves a grid twice as fine for the decoder.
            groups: of every group norm; must divide base_width.

        Raises:
            InputError: groups does not divide base_width.
        """
        super().__init__()
        from monai.networks.nets import ResNet

        block, depths, width = _RESNETS[variant]
        width = base_width or width
        if width % groups:
            raise InputError(f"ResNet3D: base_width {width} is not a multiple of groups {groups}.")
        net = ResNet(
            block, depths, [width, 2 * width, 4 * width, 8 * width], spatial_dims=3, n_input_channels=1,
            conv1_t_size=stem_kernel, conv1_t_stride=stem_stride, no_max_pool=not max_pool, feed_forward=False,
            norm="batch", bias_downsample=False,
        )  # fmt: skip
        _group_norm(net, groups)
        if last_stride == 1:
            for module in net.layer4.modules():
                if isinstance(module, nn.Conv3d):
                    module.stride = (1, 1, 1)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.act, net.maxpool if max_pool else nn.Identity())
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.embed_dim = 8 * width * (4 if block == "bottleneck" else 1)
        self.init_args = {
            "variant": variant,
            "base_width": width,
            "stem_kernel": stem_kernel,
            "stem_stride": stem_stride,
            "max_pool": max_pool,
            "last_stride": last_stride,
            "groups": groups,
        }

    def _through(self, block: nn.Module, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[2] < SHALLOW and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super()._through(block, x.float())
        return super()._through(block, x)

    def forward(self, volume: Tensor) -> EncoderOutput:
        """Encode volumes (B, 1, D, H, W) of any size; tokens in D, H, W order."""
        _check_volume(volume, "ResNet3D")
        if self._channels_last:
            volume = volume.contiguous(memory_format=torch.channels_last_3d)
        x = self._through(self.stem, volume)
        stages: list[Any] = list(self.stages)
        for stage in stages:
            for block in stage:
                x = self._through(block, x)
        tokens = x.flatten(2).transpose(1, 2)
        return EncoderOutput(pooled=tokens.mean(dim=1), tokens=tokens)

    def token_grid(self, shape: tuple[int, int, int]) -> TokenGrid:
        """Every convolution and pool is padded by half its kernel: its first output lies on the first voxel."""
        pool = 2 if self.init_args["max_pool"] else 1
        step = self.init_args["stem_stride"] * pool * 4 * self.init_args["last_stride"]
        d, h, w = (-(-n // step) for n in shape)
        return TokenGrid((d, h, w), (step, step, step), (0.0, 0.0, 0.0))

    def layers(self) -> list[list[nn.Module]]:
        """Stem, then each residual block."""
        stages: list[Any] = list(self.stages)
        return [[self.stem], *([block] for stage in stages for block in stage)]


class _Attention(nn.Module):
    """MONAI's self-attention through `scaled_dot_product_attention`: no (T, T) matrix in memory (Dao et al. 2022).

    MONAI's own `use_flash_attention` drops attention weights in evaluation too.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.qkv, self.out_proj, self.drop_output = block.qkv, block.out_proj, block.drop_output
        self.heads, self.dropout = block.num_heads, block.dropout_rate

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, T, C) to the same; no mask is taken, since a volume has none."""
        del attn_mask
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.drop_output(self.out_proj(mixed.transpose(1, 2).flatten(2)))
        return out


_VITS: dict[str, tuple[int, int, int]] = {"small": (128, 4, 4), "vit_s": (384, 12, 6), "vit_b": (768, 12, 12)}


class ViT3D(CTEncoder):
    """MONAI's 3D vision transformer (Dosovitskiy et al. 2021) with layer norm; the mean of the tokens is the pooled."""

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: Sequence[int] = (8, 8, 8),
        variant: Literal["small", "vit_s", "vit_b"] = "small",
        dropout: float = 0.0,
    ) -> None:
        """Build it.

        Args:
            img_size: (D, H, W) of every volume.
            patch_size: (D, H, W) of a token; must divide img_size.
            variant: width, depth and heads: `small` (128, 4, 4) for CPUs, `vit_s` (384, 12, 6), `vit_b` (768, 12, 12).
            dropout: rate.

        Raises:
            InputError: patch_size does not divide img_size.
        """
        super().__init__()
        size, patch = tuple(int(n) for n in img_size), tuple(int(n) for n in patch_size)
        if len(size) != 3 or len(patch) != 3 or any(n % p for n, p in zip(size, patch)):
            raise InputError(
                f"ViT3D: img_size {size} is not a multiple of patch_size {patch}; expected (D, H, W) each."
            )
        from monai.networks.nets import ViT

        width, depth, heads = _VITS[variant]
        net = ViT(
            in_channels=1, img_size=size, patch_size=patch, hidden_size=width, mlp_dim=4 * width, num_layers=depth,
            num_heads=heads, proj_type="conv", pos_embed_type="learnable", classification=False, dropout_rate=dropout,
            spatial_dims=3, qkv_bias=True,
        )  # fmt: skip
        self.patch_embedding, self.blocks, self.norm = net.patch_embedding, net.blocks, net.norm
        for block in net.blocks:
            # MONAI always makes these, without a use here: DDP waits for gradients of all parameters.
            block.norm_cross_attn, block.cross_attn = nn.Identity(), nn.Identity()
            block.attn = _Attention(block.attn)
        self.embed_dim = width
        self._img_size = size
        self.init_args = {
            "img_size": list(size),
            "patch_size": list(patch),
            "variant": variant,
            "dropout": dropout,
        }

    def forward(self, volume: Tensor) -> EncoderOutput:
        """Encode volumes (B, 1, D, H, W) of exactly the size that it was built for; tokens in D, H, W order.

        Raises:
            InputError: the volumes have another size.
        """
        _check_volume(volume, "ViT3D")
        if tuple(volume.shape[2:]) != self._img_size:
            raise InputError(
                f"ViT3D: volume of {tuple(volume.shape[2:])} voxels, built for {self._img_size}. Set img_size to the"
                " volume spec's shape, or the shape to it."
            )
        x = self.patch_embedding(volume)
        for block in self.blocks:
            x = self._through(block, x)
        tokens = self.norm(x)
        return EncoderOutput(pooled=tokens.mean(dim=1), tokens=tokens)

    def token_grid(self, shape: tuple[int, int, int]) -> TokenGrid:
        """A token is centred on its patch."""
        p0, p1, p2 = (int(n) for n in self.init_args["patch_size"])
        return TokenGrid(
            (shape[0] // p0, shape[1] // p1, shape[2] // p2),
            (p0, p1, p2),
            ((p0 - 1) / 2, (p1 - 1) / 2, (p2 - 1) / 2),
        )

    def layers(self) -> list[list[nn.Module]]:
        """Patch embedding, then each block, the final norm with the last."""
        blocks: list[list[nn.Module]] = [[block] for block in self.blocks]
        blocks[-1].append(self.norm)
        return [[self.patch_embedding], *blocks]

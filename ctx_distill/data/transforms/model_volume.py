"""Convert a scan on its native grid to a model's input tensor: orientation, spacing, size, window.

The physical centres of scan and tensor coincide. The tensor is padded with air beyond the scan.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.data.io.size_limits import MAX_VOXELS
from ctx_distill.data.io.volume import Volume, read_volume
from ctx_distill.data.transforms.resample import resample
from ctx_distill.data.transforms.rounding import from_steps, to_steps
from ctx_distill.errors import InputError

AIR_HU = -1024.0
"""The value beyond the scan."""

# Unit vectors in LPS millimetres.
_DIRECTIONS: dict[str, tuple[float, float, float]] = {
    "L": (1.0, 0.0, 0.0), "R": (-1.0, 0.0, 0.0),
    "P": (0.0, 1.0, 0.0), "A": (0.0, -1.0, 0.0),
    "S": (0.0, 0.0, 1.0), "I": (0.0, 0.0, -1.0),
}  # fmt: skip
# The file's axes, slowest first, as the tensor's D, H, W.
_FILE_AXES = {"KJI": [0, 1, 2], "KIJ": [0, 2, 1]}
# Part of the fingerprint: increase it when the same spec gives different tensors.
_VERSION = 1


@dataclass(frozen=True)
class VolumeSpec:
    """The specification of a model's input tensor.

    Attributes:
        spacing: mm between voxels along (z, y, x), the tensor's D, H, W.
        shape: (D, H, W).
        window: HU mapped to the ends of `output_range`; values outside are clamped.
        output_range: min and max value of the tensor.
        orientation: direction of increasing index along x, y, z (W, H, D): one letter each of L/R, P/A, S/I, in any
            order. The default "LPS" shows axial slices in radiological view, ordered from the feet upwards. "KJI" and
            "KIJ" use the file's axes for D, H, W, the slowest (k) first, regardless of their direction.
        antialias: smooth along axes that are reduced by more than 1.5, see `resample.gaussian_sigma`.
        stored: `int16` rounds the tensor to the steps of prepared volumes (`data.transforms.rounding`), whether it is
            read from a prepared volume or from the scan; None does not round.
        outside: HU beyond the scan; None is `AIR_HU`.

    Raises:
        InputError: an invalid value.
    """

    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    window: tuple[float, float] = (-1000.0, 1000.0)
    output_range: tuple[float, float] = (-1.0, 1.0)
    orientation: str = "LPS"
    antialias: bool = True
    stored: Literal["int16"] | None = None
    outside: float | None = None

    def __post_init__(self) -> None:
        # YAML and JSON give lists; convert to tuples of floats so that equal specs have equal hashes and text.
        for name, count in (("spacing", 3), ("shape", 3), ("window", 2), ("output_range", 2)):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), count))
        if min(self.spacing) <= 0:
            raise _invalid("spacing", self.spacing, "three positive numbers in mm (z, y, x)")
        if any(n != int(n) or n < 1 for n in self.shape) or math.prod(self.shape) > MAX_VOXELS:
            raise _invalid(
                "shape", self.shape, f"three positive integers (D, H, W) with at most {MAX_VOXELS:.0e} voxels"
            )
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        for name in ("window", "output_range"):
            low, high = getattr(self, name)
            if low >= high:
                raise _invalid(name, (low, high), "two increasing numbers")
        code = self.orientation.upper() if isinstance(self.orientation, str) else ""
        if code not in _FILE_AXES and sorted(_axis_of(letter) for letter in code) != [0, 1, 2]:
            raise _invalid(
                "orientation", self.orientation, "one letter each of L/R, P/A and S/I, such as LPS or RAS, or KJI, KIJ"
            )
        object.__setattr__(self, "orientation", code)
        if not isinstance(self.antialias, bool):
            raise _invalid("antialias", self.antialias, "true or false")
        if self.stored not in (None, "int16"):
            raise _invalid("stored", self.stored, "int16 or null")
        if self.outside is not None:
            object.__setattr__(self, "outside", _numbers("outside", [self.outside], 1)[0])

    def to_config(self) -> dict[str, Any]:
        """Return the spec as JSON values; fields that are None are omitted, so that older specs keep their fingerprint."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in plain.items() if value is not None}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VolumeSpec:
        """Create a spec from the values of `to_config`.

        Raises:
            InputError: missing or unknown keys, or invalid values.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(config) - set(known))
        missing = [name for name in ("spacing", "shape") if name not in config]
        if unknown or missing:
            raise InputError(
                f"volume spec: unknown keys {unknown}, missing keys {missing}; expected {', '.join(known)}"
            )
        return cls(**dict(config))

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of everything that determines the tensor's values."""
        text = json.dumps({"version": _VERSION, **self.to_config()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _invalid(name: str, value: object, expected: str) -> InputError:
    return InputError(f"volume spec: {name} is {value!r}; expected {expected}")


def _axis_of(letter: str) -> int:
    return next((i for i, pair in enumerate(("LR", "PA", "SI")) if letter in pair), -1)


def _numbers(name: str, value: object, count: int) -> tuple[float, ...]:
    if isinstance(value, (list, tuple)) and len(value) == count:
        plain = [v for v in value if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
        if len(plain) == count:
            return tuple(float(v) for v in plain)
    raise _invalid(name, value, f"{count} finite numbers")


def target_affine(volume: Volume, spec: VolumeSpec) -> NDArray[np.float64]:
    """Return the affine (4, 4) from the tensor's index (d, h, w, 1) to LPS mm, centred on the scan."""
    affine = np.eye(4)
    affine[:3, :3] = _directions(volume, spec) * np.array(spec.spacing)
    middle = np.append((np.array(volume.voxels.shape) - 1) / 2, 1.0)
    centre = (volume.affine_lps @ middle)[:3]
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(spec.shape) - 1) / 2)
    return affine


def _directions(volume: Volume, spec: VolumeSpec) -> NDArray[np.float64]:
    """Return unit columns (3, 3) in LPS along which D, H and W increase."""
    if spec.orientation in _FILE_AXES:
        steps = volume.affine_lps[:3, _FILE_AXES[spec.orientation]]
        units: NDArray[np.float64] = steps / np.linalg.norm(steps, axis=0)
        return units
    x, y, z = (np.array(_DIRECTIONS[letter]) for letter in spec.orientation)
    return np.stack([z, y, x], axis=1)


def prepare_volume(volume: Volume, spec: VolumeSpec) -> Tensor:
    """Reorient, resample, crop or pad, and window a scan; return (1, D, H, W) float32 in `spec.output_range`."""
    tensor = _windowed(volume, spec)
    return from_steps(to_steps(tensor, spec.output_range), spec.output_range) if spec.stored else tensor


def prepare_steps(volume: Volume, spec: VolumeSpec) -> Tensor:
    """Return the tensor of `prepare_volume` as int16 steps (1, D, H, W) for prepared volumes."""
    return to_steps(_windowed(volume, spec), spec.output_range)


def _windowed(volume: Volume, spec: VolumeSpec) -> Tensor:
    to_source = np.linalg.inv(volume.affine_lps) @ target_affine(volume, spec)
    outside = AIR_HU if spec.outside is None else spec.outside
    hu = resample(volume.voxels, to_source, spec.shape, outside=outside, antialias=spec.antialias)
    (low, high), (bottom, top) = spec.window, spec.output_range
    scale = (top - bottom) / (high - low)
    return hu.mul_(scale).add_(bottom - low * scale).clamp_(bottom, top)[None]


def load_ct(path: Path, spec: VolumeSpec) -> Tensor:
    """Read and prepare a scan; return (1, D, H, W) float32.

    Raises:
        InputError: as `read_volume`.
    """
    return prepare_volume(read_volume(path), spec)

"""A person: the numbers that make one chest differ from another, and the surfaces that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.interpolate import PchipInterpolator

from ctx_distill.phantom.canvas import Array, Numbers


@dataclass(frozen=True)
class Person:
    """One synthetic person. Lengths are mm, densities HU; z grows upwards, y backwards, x to the patient's left.

    Attributes:
        scale: body size relative to an average adult.
        cage_width, cage_depth: inner half width and half depth of the rib cage.
        lung_top, lung_base: z of the lung apex and of the deepest recess.
        dome_right, dome_left: z of the two domes of the diaphragm.
        dome_drop: how far the diaphragm falls from its dome to the chest wall.
        fat: thickness of subcutaneous fat.
        female: whether breasts are painted.
        heart_scale, heart_shift: size relative to average; x of the heart's centre.
        heart_turn: radians that the heart's long axis is steeper than average.
        aorta_radius: radius of the ascending aorta.
        lung_hu, lung_gradient: density of the lung, and its rise per mm towards the back.
        vessel_gain: calibre of the lung vessels relative to average.
        blood_hu: density of blood; far above 40 after contrast medium.
        bone_hu: density of bone; falls with age.
        detail: seed of the fine detail: the branching of vessels.
    """

    scale: float
    cage_width: float
    cage_depth: float
    lung_top: float
    lung_base: float
    dome_right: float
    dome_left: float
    dome_drop: float
    fat: float
    female: bool
    heart_scale: float
    heart_shift: float
    heart_turn: float
    aorta_radius: float
    lung_hu: float
    lung_gradient: float
    vessel_gain: float
    blood_hu: float
    bone_hu: float
    detail: int

    @property
    def contrast(self) -> bool:
        """Whether contrast medium was given (CT only)."""
        return self.blood_hu > 80

    @property
    def wall(self) -> float:
        """Thickness of the chest wall outside the ribs, in mm."""
        return 17 * self.scale + self.fat

    @cached_property
    def _width(self) -> PchipInterpolator:
        return PchipInterpolator(
            [-0.3, 0.0, 0.25, 0.5, 0.7, 0.85, 0.95, 1.0, 1.3], [0.93, 0.97, 1.0, 0.97, 0.87, 0.70, 0.52, 0.4, 0.3]
        )

    @cached_property
    def _depth(self) -> PchipInterpolator:
        return PchipInterpolator(
            [-0.3, 0.0, 0.3, 0.6, 0.8, 0.95, 1.0, 1.3], [0.93, 0.97, 1.0, 0.9, 0.74, 0.52, 0.42, 0.35]
        )

    def _level(self, z: Numbers | float) -> Numbers:
        """Height 0..1 between the recess and the apex."""
        return np.asarray((np.asarray(z) - self.lung_base) / (self.lung_top - self.lung_base))

    def half_width(self, z: Numbers | float) -> Array:
        """Inner half width of the rib cage at z (mm), in mm."""
        return np.asarray(self.cage_width * self._width(self._level(z)), np.float32)

    def half_depth(self, z: Numbers | float) -> Array:
        """Inner half depth of the rib cage at z (mm), in mm."""
        return np.asarray(self.cage_depth * self._depth(self._level(z)), np.float32)

    def middle(self, z: Numbers | float) -> Array:
        """y (mm) of the cage's middle at z (mm): the breastbone slopes, so the upper chest lies further back."""
        return np.asarray(self.cage_depth * 0.36 * np.clip(self._level(z) - 0.35, 0, 1) ** 1.3, np.float32)

    def dome(self, y: Array, x: Array) -> Array:
        """z (mm) of the diaphragm over y, x (mm), the same shape as they."""
        left = x > 0
        centre = np.where(left, 0.52, -0.5) * self.cage_width
        top = np.where(left, self.dome_left, self.dome_right)
        across = (x - centre) / (0.56 * self.cage_width)
        along = (y + 0.1 * self.cage_depth) / (0.95 * self.cage_depth)
        fall = across**2 + along**2
        return np.asarray(top - self.dome_drop * fall / (0.7 + 0.3 * fall) - 14 * along, np.float32)


def sample_person(rng: np.random.Generator) -> Person:
    """Draws a person."""

    def around(mean: float, spread: float, low: float = -2.2, high: float = 2.2) -> float:
        return float(mean + spread * np.clip(rng.normal(), low, high))

    female = bool(rng.random() < 0.5)
    scale = around(0.97 if female else 1.03, 0.04)
    breath = around(0, 7)
    dome = -74 * scale - breath
    # Contrast is drawn for everybody, also where it shows no trace (radiographs), so that a person is one person.
    blood = float(rng.uniform(110, 190)) if rng.random() < 0.35 else float(rng.uniform(36, 48))
    return Person(
        scale=scale,
        cage_width=around(133, 6) * scale,
        cage_depth=around(93, 6) * scale,
        lung_top=around(124, 4) * scale,
        lung_base=dome - around(58, 5) * scale,
        dome_right=dome + around(5, 3),
        dome_left=dome - around(7, 3),
        dome_drop=around(44, 6) * scale,
        fat=float(np.clip(rng.gamma(3.0, 4.5), 4, 34)),
        female=female,
        heart_scale=around(1.06, 0.045),
        heart_shift=around(21, 4),
        heart_turn=around(0.0, 0.12),
        aorta_radius=around(14.5, 1.2) * scale,
        lung_hu=around(-855, 20),
        lung_gradient=float(rng.uniform(0.2, 0.6)),
        vessel_gain=around(1.0, 0.1),
        blood_hu=blood,
        bone_hu=around(520, 90),
        detail=int(rng.integers(2**31)),
    )

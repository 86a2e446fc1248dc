"""A frontal radiograph of a phantom: line integrals of attenuation, scatter, noise and a film's tone curve."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ctx_distill.phantom.anatomy import Person
from ctx_distill.phantom.canvas import Array, Canvas, Grid
from ctx_distill.phantom.lesions import paint_chest
from ctx_distill.phantom.planted_findings import PlantedFinding

HEIGHT = 160
"""Rows of a radiograph; its columns vary with the collimation."""

_WATER = 0.0175  # attenuation of water per mm at the effective energy of a chest film (about 80 keV)


def attenuation(hu: Array) -> Array:
    """Linear attenuation per mm from HU; bone gains from its higher atomic number."""
    relative = 1 + hu / np.float32(1000)
    relative += np.float32(0.7) * np.maximum(hu - np.float32(100), 0) / np.float32(1000)
    return np.asarray(np.float32(_WATER) * np.maximum(relative, 0))


def radiograph(person: Person, findings: list[PlantedFinding], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The frontal film (HEIGHT, columns) of a person: bone white, patient's right on the left, upright.

    The volume is finer across the picture than along the beam: along it everything is summed anyway.
    """
    s = person.scale
    tall = float(rng.uniform(0.97, 1.06)) * (person.lung_top - person.lung_base + 95 * s)
    wide = min(tall * float(rng.uniform(0.92, 1.08)), 2.4 * person.cage_width + 2 * person.wall)
    pixel = tall / HEIGHT
    columns = round(wide / pixel)
    fine = 1.15 * pixel
    deep = 2 * (person.cage_depth + person.wall) + 70 * s
    grid = Grid(
        shape=(int(tall / fine) + 12, int(deep / 6.0), int(wide / fine) + 12),
        spacing=(fine, 6.0, fine),
        centre=(
            0.5 * (person.lung_top + person.lung_base) + float(rng.normal(8, 5)) * s,
            6.0,
            float(rng.normal(0, 4)),
        ),
        yaw=float(np.clip(rng.normal(0, 0.05), -0.12, 0.12)),
    )
    canvas = Canvas(grid)
    person = dataclasses.replace(person, blood_hu=min(person.blood_hu, 45.0))  # no contrast medium on a plain film
    paint_chest(canvas, person, findings, upright=True)
    integral = attenuation(canvas.hu).sum(axis=1)[::-1] * np.float32(grid.spacing[1])
    roll = float(np.clip(rng.normal(0, 0.02), -0.05, 0.05))
    turn = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]]) * (pixel / fine)
    middle_in, middle_out = (np.asarray(integral.shape) - 1) / 2, (np.array([HEIGHT, columns]) - 1) / 2
    integral = ndimage.affine_transform(
        integral, turn, middle_in - turn @ middle_out, (HEIGHT, columns), order=1, mode="nearest"
    )
    return _develop(integral, rng)


def _develop(integral: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """From line integrals (rows, columns) to the 8-bit picture."""
    primary = np.exp(-integral)
    dose = float(rng.uniform(4e3, 1.6e4))
    scatter = float(rng.uniform(0.25, 0.5)) * ndimage.gaussian_filter(primary, 14)
    # A grid and its processing take most of the scatter away; what stays lowers contrast where little passes.
    exposed = primary + 0.25 * scatter
    exposed = exposed * (1 + rng.standard_normal(exposed.shape, np.float32) / np.sqrt(np.maximum(exposed * dose, 1)))
    film = -np.log(np.maximum(exposed, 1e-4))
    film += np.float32(rng.uniform(0.15, 0.4)) * (film - ndimage.gaussian_filter(film, float(rng.uniform(8, 16))))
    film = ndimage.gaussian_filter(film, float(rng.uniform(0.3, 0.6)))
    # The S of a film's curve: steep from the lungs to the mediastinum, flat where nothing is to be read.
    rows, columns = film.shape
    core = film[rows // 6 : 5 * rows // 6, columns // 6 : 5 * columns // 6]
    low, high = np.percentile(core, [float(rng.uniform(8, 14)), float(rng.uniform(90, 95))])
    tone = 1 / (1 + np.exp(-float(rng.uniform(3.0, 3.8)) * ((film - low) / max(high - low, 1e-3) - 0.5)))
    return _collimate((tone * float(rng.uniform(225, 250)) + float(rng.uniform(0, 8))), rng)


def _collimate(picture: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blackens what the collimator kept dark: on some films a strip at one or more edges."""
    rows, columns = picture.shape
    for axis, length in ((0, rows), (1, columns)):
        for first in (True, False):
            strip = int(rng.uniform(0, 0.05) * length) if rng.random() < 0.3 else 0
            if strip:
                at = slice(0, strip) if first else slice(length - strip, length)
                picture[(at, slice(None)) if axis == 0 else (slice(None), at)] = 4
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)

"""Paints what is planted on a chest: one function a finding, all of the same shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ctx_distill.phantom.anatomy import Person
from ctx_distill.phantom.canvas import Array, Canvas, Point, Slices
from ctx_distill.phantom.planted_findings import PlantedFinding, adapt
from ctx_distill.phantom.skeleton import paint_bones
from ctx_distill.phantom.thorax import (
    heart_frame,
    hilum,
    paint_abdomen,
    paint_heart,
    paint_lung_vessels,
    paint_lungs,
    paint_mediastinum,
    paint_trunk,
)


def paint_chest(canvas: Canvas, person: Person, findings: list[PlantedFinding], upright: bool) -> None:
    """Paints a person with findings: upright with the arms down (radiograph), or supine with the arms up (CT)."""
    person = adapt(person, findings)
    cage = paint_trunk(canvas, person, arms_up=not upright)
    paint_abdomen(canvas, person, cage)
    paint_lungs(canvas, person, cage)
    paint_lung_vessels(canvas, person)
    paint_mediastinum(canvas, person)
    fluid = max((f.size for f in findings if f.name == "pericardial effusion"), default=0.0)
    paint_heart(canvas, person, fluid)
    for finding in findings:
        paint = _LESIONS.get(finding.name)
        if paint is not None:
            paint(canvas, person, finding, upright)
    paint_bones(canvas, person, arms_up=not upright)


def _signs(finding: PlantedFinding) -> list[float]:
    """The sides as signs of x: -1 right, 1 left."""
    return {"left": [1.0], "right": [-1.0]}.get(finding.side, [-1.0, 1.0])


def _all_lung(canvas: Canvas, at: Slices) -> Array:
    """Lung share of a box with its soft rim filled up, so that no dark line is left between a filling and the wall."""
    return np.asarray(np.minimum(canvas.lung[at] * np.float32(2), 1))


def _half(canvas: Canvas, person: Person, sign: float, low: float, high: float) -> Slices | None:
    """The box of one half of the chest between two heights (mm)."""
    edge = sign * 1.15 * person.cage_width
    return canvas.box((low, -160, min(0.0, edge)), (high, 160, max(0.0, edge)))


def lung_point(person: Person, sign: float, place: str, rng: np.random.Generator) -> Point:
    """A point (z, y, x) mm well inside the lung on one side, in a part of it (`PlantedFinding.place`)."""
    s = person.scale
    dome = person.dome_left if sign > 0 else person.dome_right
    heights = {"upper": (0.25, 0.62), "middle": (-0.28, -0.1), "lower": (-0.4, -0.06), "basal": (-0.42, -0.15)}
    low, high = heights.get(place, (-0.3, 0.6))
    z = max(float(rng.uniform(low, high)) * person.lung_top, dome + 22 * s)
    backs = {"upper": (-0.35, 0.3), "middle": (-0.5, -0.2), "lower": (0.2, 0.6), "basal": (0.2, 0.6)}
    y = float(person.middle(z) + rng.uniform(*backs.get(place, (-0.4, 0.5))) * person.half_depth(z))
    inner = 44 * s if place != "middle" else 58 * s
    narrowing = float(np.sqrt(1 - min(abs(y) / (1.15 * person.cage_depth), 0.8) ** 2))
    outer = float(person.half_width(z)) * narrowing - 16 * s
    return z, y, sign * (inner + float(rng.uniform(0.25, 0.8)) * max(outer - inner, 0.0))


def _cluster(
    canvas: Canvas, centre: Point, radius: float, count: int, rng: np.random.Generator, squeeze: float = 1.0
) -> tuple[Slices, Array] | None:
    """Coverage of an irregular blob: the union of `count` ellipsoids scattered about `centre`, `radius` mm wide."""
    reach = 1.5 * radius + canvas.soft
    at = canvas.box([c - reach for c in centre], [c + reach for c in centre])
    if at is None:
        return None
    z, y, x = canvas.coordinates(at)
    depth = np.full(np.broadcast_shapes(z.shape, y.shape), -1e3, np.float32)
    for _ in range(count):
        offset = rng.normal(0, 0.38 * radius, 3).astype(np.float32)
        size = (rng.uniform(0.5, 0.8, 3) * radius).astype(np.float32)
        size[0] *= squeeze
        square = ((z - centre[0] - offset[0]) / size[0]) ** 2 + (
            ((y - centre[1] - offset[1]) / size[1]) ** 2 + ((x - centre[2] - offset[2]) / size[2]) ** 2
        )
        np.maximum(depth, (1 - np.sqrt(square)) * np.float32(size.min()), out=depth)
    return at, depth


def _effusion(canvas: Canvas, person: Person, finding: PlantedFinding, upright: bool) -> None:
    s, e = person.scale, finding.extent
    for sign in _signs(finding):
        at = _half(canvas, person, sign, person.lung_base - 10, 70 * s)
        if at is None:
            continue
        z, y, x = canvas.coordinates(at)
        dome = person.dome_left if sign > 0 else person.dome_right
        if upright:
            # A meniscus: the fluid climbs along the chest wall.
            level = dome - (26 - 62 * e) * s + np.float32(26 * s) * (np.abs(x) / np.float32(person.cage_width)) ** 3
            depth = level - z + np.float32(0.08) * y
        else:
            # Lying down it runs to the back, thickest at the base.
            front = np.float32((62 - 40 * e) * s) + np.float32(0.3) * np.maximum(z - np.float32(dome - 30 * s), 0)
            depth = y - front - person.middle(z) * np.float32(0.5)
        cover = canvas.edge(depth) * _all_lung(canvas, at) * (x * sign > 0)
        canvas.blend(at, cover, 12.0)


def _pneumothorax(canvas: Canvas, person: Person, finding: PlantedFinding, upright: bool) -> None:
    s, e = person.scale, finding.extent
    sign = _signs(finding)[0]
    at = _half(canvas, person, sign, person.lung_base - 10, person.lung_top + 15)
    if at is None:
        return
    z, y, x = canvas.coordinates(at)
    width, depth = person.half_width(z), person.half_depth(z)
    # The collapsed lung is a smaller lung about the hilum: air gathers where it is highest.
    up = np.clip((z - person.dome_right) / (person.lung_top - person.dome_right), 0, 1.2)
    if upright:
        rim = (12 + 14 * e) * s + (20 + 26 * e) * s * up**1.5
        radius = np.sqrt((x / width) ** 2 + ((y - person.middle(z)) / depth) ** 2)
    else:
        rim = (8 + 12 * e) * s + (8 + 10 * e) * s * up
        lift = np.float32((14 + 16 * e) * s)
        radius = np.sqrt((x / width) ** 2 + ((y - lift - person.middle(z)) / depth) ** 2)
    out = (rim - (1 - radius) * 0.5 * (width + depth)).astype(np.float32)
    air = canvas.edge(out) * canvas.lung[at] * (x * sign > 0)
    line = np.clip(1 - np.abs(out) / np.float32(1.2 * canvas.soft), 0, 1) * canvas.lung[at] * (x * sign > 0)
    lost = np.float32(100 + 130 * e)
    canvas.hu[at] += canvas.lung[at] * (1 - air) * (x * sign > 0) * lost
    canvas.blend(at, air, -1000.0)
    canvas.hu[at] += line * np.float32(500 / canvas.soft)


def _consolidation(canvas: Canvas, person: Person, finding: PlantedFinding, _upright: bool) -> None:
    rng = np.random.default_rng(finding.seed)
    sign = _signs(finding)[0]
    centre = lung_point(person, sign, finding.place, rng)
    radius = (30 + 24 * finding.extent) * person.scale
    found = _cluster(canvas, centre, radius, 8, rng, squeeze=0.85)
    if found is None:
        return
    at, depth = found
    fade = np.clip(depth / np.float32(10) + np.float32(0.6), 0, 1)
    x = canvas.coordinates(at)[2]
    canvas.blend(at, fade * _all_lung(canvas, at) * (x * sign > 0), float(rng.uniform(5, 40)))
    # air bronchograms
    start = np.asarray(hilum(person, sign))
    for _ in range(3):
        aim = np.asarray(centre) + rng.normal(0, 0.3 * radius, 3)
        way = [tuple(start + t * (aim - start)) for t in (0.55, 0.8, 1.0)]
        canvas.tube(way, [2.6, 2.2, 1.6], -850.0, solid=False)


def _atelectasis(canvas: Canvas, person: Person, finding: PlantedFinding, _upright: bool) -> None:
    """Bands of airless lung above a raised diaphragm (`adapt` raised it)."""
    rng = np.random.default_rng(finding.seed)
    s, sign = person.scale, _signs(finding)[0]
    dome = person.dome_left if sign > 0 else person.dome_right
    for rank in range(2 + int(finding.extent > 0.5)):
        slope = float(rng.uniform(0.02, 0.2)) * sign * float(rng.choice([-1, 1]))
        length = 1 / np.hypot(1, slope)
        axes = np.array([[length, 0, -slope * length], [0, 1, 0], [slope * length, 0, length]])
        centre = (dome + (10 + 15 * rank) * s, float(rng.uniform(-10, 35)) * s, sign * float(rng.uniform(68, 82)) * s)
        thick = (4.5 + 3 * finding.extent) * s
        canvas.ellipsoid(centre, (thick, (40 + 16 * finding.extent) * s, 46 * s), -90.0, axes, within_lung=True)
    wedge = (dome - 2 * s, 52 * s, sign * 44 * s)
    canvas.ellipsoid(wedge, ((30 + 12 * finding.extent) * s, 26 * s, 22 * s), 35.0, within_lung=True)


def _round_lesion(canvas: Canvas, person: Person, finding: PlantedFinding, _upright: bool) -> None:
    """A nodule or a mass: lobulated, a mass with spicules."""
    rng = np.random.default_rng(finding.seed)
    centre = lung_point(person, _signs(finding)[0], finding.place, rng)
    radius = finding.size / 2
    density = float(rng.uniform(20, 60))
    canvas.ellipsoid(centre, (radius, radius * 0.95, radius * 1.02), density, within_lung=True)
    for _ in range(3):
        bump: Point = tuple(np.asarray(centre) + rng.normal(0, 0.42 * radius, 3))
        canvas.ellipsoid(bump, (0.62 * radius, 0.62 * radius, 0.62 * radius), density, within_lung=True)
    if finding.name == "lung mass":
        for _ in range(12):
            way = rng.normal(size=3)
            way *= radius / np.linalg.norm(way)
            ends = [tuple(np.asarray(centre) + way), tuple(np.asarray(centre) + way * rng.uniform(1.3, 1.6))]
            canvas.tube(ends, [1.8, 0.8], 0.0, solid=False)


def _ground_glass(canvas: Canvas, person: Person, finding: PlantedFinding, _upright: bool) -> None:
    rng = np.random.default_rng(finding.seed)
    for sign in _signs(finding):
        for _ in range(5 if finding.side == "both" else 7):
            centre = lung_point(person, sign, finding.place, rng)
            found = _cluster(canvas, centre, float(rng.uniform(22, 34)) * person.scale, 4, rng)
            if found is None:
                continue
            at, depth = found
            fade = np.clip(depth / np.float32(14) + np.float32(0.5), 0, 1) * canvas.lung[at]
            # It veils the lung without hiding its vessels, and patches do not add up to a consolidation.
            haze = np.float32(-560 + 120 * finding.extent)
            canvas.hu[at] += fade * np.maximum(haze - canvas.hu[at], 0) * np.float32(0.85)


def _emphysema(canvas: Canvas, person: Person, finding: PlantedFinding, _upright: bool) -> None:
    """Holes in the lung; `adapt` thinned it and flattened the diaphragm."""
    rng = np.random.default_rng(finding.seed)
    for sign in (-1.0, 1.0):
        for _ in range(16 + int(14 * finding.extent)):
            z, y, x = lung_point(person, sign, finding.place, rng)
            radius = float(rng.uniform(5, 12 + 5 * finding.extent)) * person.scale
            canvas.ellipsoid((z, y, x), (radius, radius, radius), -992.0, solid=False, within_lung=True)


def _fibrosis(canvas: Canvas, person: Person, finding: PlantedFinding, _upright: bool) -> None:
    """A net of fine lines under the pleura, densest at the bases."""
    rng = np.random.default_rng(finding.seed)
    s, base = person.scale, min(person.dome_left, person.dome_right)
    count = int(1500 + 1300 * finding.extent)
    z = base - 35 * s + (70 + 45 * finding.extent) * s * rng.power(0.8, count)[:, None]
    angle = rng.uniform(0.25, 2.6, count)[:, None]
    sign = rng.choice([-1.0, 1.0], count)[:, None]
    ring = 1 - rng.exponential(0.13, count)[:, None]
    y = person.middle(z) + person.half_depth(z) * np.cos(angle) * ring
    x = sign * person.half_width(z) * np.sin(angle) * ring
    start = np.concatenate([z, y, x], axis=1)
    way = rng.normal(0, 1, (count, 3)) * 7 * s
    along = np.linspace(0, 1, 5)[None, :, None]
    points = (start[:, None] + way[:, None] * along).reshape(-1, 3)
    length = np.linalg.norm(way, axis=1)
    filled = canvas.splat(points, np.repeat(np.pi * 1.5**2 * length / 5, 5)) * canvas.lung
    canvas.hu += filled * (np.float32(60) - canvas.hu)
    # the veil that such a net leaves on voxels coarser than its meshes
    at = canvas.box((base - 60 * s, -150, -200), (base + 60 * s, 150, 200))
    if at is None:
        return
    zb, _, _ = canvas.coordinates(at)
    rim = np.clip(1 - cage_part(canvas, person, at) / np.float32(26 * s), 0, 1)
    fade = np.clip((np.float32(base + 55 * s) - zb) / np.float32(50 * s), 0, 1)
    canvas.hu[at] += rim * fade * canvas.lung[at] * np.float32(130 + 120 * finding.extent)


def cage_part(canvas: Canvas, person: Person, at: Slices) -> Array:
    """Depth in mm under the pleura, in a box."""
    z, y, x = canvas.coordinates(at)
    width, depth = person.half_width(z), person.half_depth(z)
    radius = np.sqrt((x / width) ** 2 + ((y - person.middle(z)) / depth) ** 2)
    return np.asarray((1 - radius) * 0.5 * (width + depth), np.float32)


def _coronary(canvas: Canvas, person: Person, finding: PlantedFinding, _upright: bool) -> None:
    """Plaques along three arteries on the heart's surface."""
    rng = np.random.default_rng(finding.seed)
    centre, radii, axes = heart_frame(person)
    points: list[NDArray[np.float64]] = []
    for start, stop in ((1.15, 2.3), (2.5, 3.6), (-0.6, 0.7)):
        angle = np.linspace(start, stop, 14) + rng.normal(0, 0.02)
        lift = np.linspace(-0.45, 0.5, 14)
        ring = np.sqrt(1 - lift**2)
        local = np.stack([lift * radii[0], np.cos(angle) * ring * radii[1], np.sin(angle) * ring * radii[2]], axis=1)
        path = np.asarray(centre) + local * 1.03 @ axes
        keep = rng.random(14) < 0.45 + 0.4 * finding.extent
        points.append(path[keep])
    plaques = np.concatenate(points)
    cloud = np.repeat(plaques, 24, axis=0) + rng.normal(0, 1.9, (24 * len(plaques), 3))
    filled = canvas.splat(cloud, np.full(len(cloud), (110 + 80 * finding.extent) / 24))
    canvas.hu += filled * (np.float32(1250) - canvas.hu)


def _hernia(canvas: Canvas, person: Person, finding: PlantedFinding, upright: bool) -> None:
    s, radius = person.scale, finding.size / 2
    centre: Point = (person.dome_left + (8 + 0.55 * radius) * s, 34 * s + 0.18 * radius, 10 * s)
    found = canvas.cover_ellipsoid(centre, (0.95 * radius, 0.8 * radius, radius))
    if found is None:
        return
    at, cover = found
    canvas.blend(at, cover, 28.0)
    inner = canvas.cover_ellipsoid(centre, (0.95 * radius - 4, 0.8 * radius - 4, radius - 4))
    if inner is None:
        return
    at, cover = inner
    z, y, _ = canvas.coordinates(at)
    # Gas lies above the fluid: towards the head upright, towards the breastbone supine.
    gas = canvas.edge(z - np.float32(centre[0] + 0.05 * radius)) if upright else canvas.edge(np.float32(centre[1]) - y)
    canvas.blend(at, cover * gas, -930.0)


def _nodes(canvas: Canvas, person: Person, finding: PlantedFinding, _upright: bool) -> None:
    rng = np.random.default_rng(finding.seed)
    s = person.scale
    stations: list[Point] = [(60, 2, -24), (42, -14, 30), (14, 20, 0), (8, 8, -46), (12, 8, 48), (78, 0, -22)]
    for station in rng.permutation(len(stations))[: 4 + int(3 * finding.extent)]:
        z, y, x = (np.asarray(stations[station]) + rng.normal(0, 3, 3)) * s
        radius = finding.size * float(rng.uniform(0.42, 0.6))
        canvas.ellipsoid((z, y, x), (1.15 * radius, radius, radius), float(rng.uniform(35, 55)))


_LESIONS: dict[str, Callable[[Canvas, Person, PlantedFinding, bool], None]] = {
    "pleural effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "consolidation": _consolidation,
    "atelectasis": _atelectasis,
    "lung nodule": _round_lesion,
    "lung mass": _round_lesion,
    "ground-glass opacity": _ground_glass,
    "emphysema": _emphysema,
    "pulmonary fibrosis": _fibrosis,
    "coronary calcification": _coronary,
    "hiatal hernia": _hernia,
    "lymphadenopathy": _nodes,
}

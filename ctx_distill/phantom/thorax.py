"""The soft parts of a chest without findings: trunk, lungs, mediastinum, heart and upper abdomen."""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator

from ctx_distill.phantom.anatomy import Person
from ctx_distill.phantom.canvas import Array, Canvas, Numbers, Point

SKIN, FAT, MUSCLE, MEDIASTINUM, LIVER, SPLEEN, WATER = 20.0, -100.0, 52.0, -55.0, 58.0, 50.0, 8.0


def squircle(x: Array, y: Array, squareness: float) -> Array:
    """Radius (1 on the boundary) of a rounded square from squared, normalised coordinates.

    Fernandez-Guasti's squircle: no power function, which would dominate the time of a whole volume. The squares are
    cut at 2, beyond which the cross term would fold the shape back to its inside.
    """
    x, y = np.minimum(x, 2), np.minimum(y, 2)
    return np.sqrt(x + y - np.float32(squareness) * x * y)


def cage_depth_mm(canvas: Canvas, person: Person) -> Array:
    """Signed depth (D, H, W) in mm inside the rib cage (positive) or outside it."""
    z = canvas.z
    width, depth = person.half_width(z), person.half_depth(z)
    radius = squircle((canvas.x**2) * width**-2, (canvas.y - person.middle(z)) ** 2 * depth**-2, 0.4)
    return (1 - radius) * (0.5 * (width + depth))


def _trunk_depth_mm(canvas: Canvas, person: Person, arms_up: bool) -> Array:
    """Signed depth (D, H, W) in mm under the skin."""
    s, wall, top = person.scale, person.wall, person.lung_top
    side = person.cage_width + wall
    shoulder = (0.98 * side, 0.96 * side, 0.72 * side) if arms_up else (1.1 * side, 1.12 * side, 0.86 * side)
    heights = [-260.0, 0.0, 0.4 * top, 0.72 * top, 0.92 * top, top + 22 * s, top + 46 * s, top + 110 * s]
    widths = [0.98 * side, side, side, *shoulder, 0.48 * side, 0.42 * side]
    front = person.cage_depth + 0.8 * wall
    depths = [front, front, 0.97 * front, 0.86 * front, 0.78 * front, 0.66 * front, 0.6 * front, 0.6 * front]
    z = canvas.z
    width = PchipInterpolator(heights, widths)(z).astype(np.float32)
    depth = PchipInterpolator(heights, depths)(z).astype(np.float32)
    radius = squircle((canvas.x**2) * width**-2, (canvas.y - person.middle(z) - np.float32(3)) ** 2 * depth**-2, 0.3)
    return np.asarray((1 - radius) * (0.5 * (width + depth)), np.float32)


def paint_trunk(canvas: Canvas, person: Person, arms_up: bool) -> Array:
    """Paints skin, fat, muscle and the cavity's fat; returns the cage's depth (D, H, W) in mm for the lungs."""
    everywhere = (slice(None), slice(None), slice(None))
    under_skin = _trunk_depth_mm(canvas, person, arms_up)
    if person.female:
        _paint_breasts(canvas, person)
    canvas.blend(everywhere, canvas.edge(under_skin), SKIN)
    canvas.blend(everywhere, canvas.edge(under_skin - np.float32(2.5)), FAT)
    canvas.blend(everywhere, canvas.edge(under_skin - np.float32(2.5 + person.fat)), MUSCLE)
    cage = cage_depth_mm(canvas, person)
    canvas.blend(everywhere, canvas.edge(cage), MEDIASTINUM)
    return cage


def _paint_breasts(canvas: Canvas, person: Person) -> None:
    s, size = person.scale, 0.75 + person.fat / 45
    for side in (-1.0, 1.0):
        z = -18 * s
        y = float(person.middle(z)) - person.cage_depth * 0.84 - person.wall * 0.55
        centre: Point = (z, y, side * 0.54 * person.cage_width)
        canvas.ellipsoid(centre, (50 * s * size, 30 * s * size, 55 * s * size), SKIN)
        canvas.ellipsoid(centre, (47 * s * size, 27 * s * size, 52 * s * size), FAT)
        canvas.ellipsoid(centre, (25 * s, 17 * s * size, 27 * s), 10.0)


def paint_abdomen(canvas: Canvas, person: Person, cage: Array) -> None:
    """Paints what lies under the diaphragm: liver, spleen, stomach with its bubble of gas."""
    above = canvas.z - person.dome(canvas.y, canvas.x)
    left = canvas.edge(np.float32(0.3) * (canvas.x - np.float32(38 * person.scale)))
    organ = LIVER + left * np.float32(-30.0 - LIVER)
    everywhere = (slice(None), slice(None), slice(None))
    canvas.blend(everywhere, canvas.edge(cage) * canvas.edge(-above), organ)
    s, dome = person.scale, person.dome_left
    canvas.ellipsoid((dome - 52 * s, 38 * s, 92 * s), (44 * s, 36 * s, 26 * s), SPLEEN)
    canvas.ellipsoid((dome - 46 * s, -16 * s, 56 * s), (38 * s, 34 * s, 34 * s), 32.0)
    canvas.ellipsoid((dome - 28 * s, -26 * s, 52 * s), (13 * s, 20 * s, 24 * s), -950.0)


def paint_lungs(canvas: Canvas, person: Person, cage: Array) -> None:
    """Paints both lungs with their gradient and fissures, and notes their share in `canvas.lung`."""
    z, y, x, s = canvas.z, canvas.y, canvas.x, person.scale
    top = person.lung_top
    middle = np.interp(z, [-120, 0, 0.4 * top, 0.8 * top, top], [20, 20, 21, 22, 17]).astype(np.float32) * s
    front = np.interp(y / person.cage_depth, [-1, -0.5, 0, 0.5, 1], [-15, -2, 5, 1, -3]).astype(np.float32)
    depth = np.minimum(cage, (np.abs(x) - front) - middle)
    np.minimum(depth, np.float32(0.8) * (z - person.dome(y, x)), out=depth)
    cover = canvas.edge(depth)
    everywhere = (slice(None), slice(None), slice(None))
    density = np.float32(person.lung_hu) + np.float32(person.lung_gradient) * y
    canvas.blend(everywhere, cover, density, solid=False)
    canvas.lung = cover
    # A fissure is a sheet thinner than any voxel here: it shows as a faint rise of density along a plane.
    for low, high, slope, keep in ((-85.0, 60.0, 1.15, x > -999), (8.0, 24.0, 0.04, (x < 0) & (y < 8))):
        at = canvas.box((low, -110, -150), (high, 110, 150))
        if at is None:
            continue
        zb, yb, _ = canvas.coordinates(at)
        plane = zb - (np.float32(slope) * (yb - 10) + np.float32(0.3 * (low + high) + 8))
        sheet = np.clip(1 - np.abs(plane) / np.float32(1.3 * canvas.soft), 0, 1) * keep[:, at[1], at[2]]
        canvas.hu[at] += sheet * canvas.lung[at] * np.float32(230 / canvas.soft)


def hilum(person: Person, side: float) -> Point:
    """(z, y, x) mm where the vessels and the main bronchus of one side (-1 right, 1 left) enter the lung."""
    s = person.scale
    return ((16 if side > 0 else 8) * s, 8 * s, side * 34 * s)


def paint_lung_vessels(canvas: Canvas, person: Person) -> None:
    """Paints the branching vessels of both lungs as splatted points."""
    rng = np.random.default_rng(person.detail)
    points, volumes = [], []
    for side in (-1.0, 1.0):
        roots = 16
        start = np.tile(np.asarray(hilum(person, side)), (roots, 1))
        turn = np.linspace(-1.35, 1.25, roots) + rng.normal(0, 0.15, roots)
        depth = np.tile([-0.9, 0.5, -0.2, 1.1], roots // 4) + rng.normal(0, 0.2, roots)
        heading = np.stack([np.sin(turn), depth, side * np.cos(turn) * rng.uniform(0.7, 1, roots)], 1)
        for length, radius in ((30, 3.6), (26, 3.0), (22, 2.3), (19, 1.75), (15, 1.3), (11, 0.95)):
            heading /= np.linalg.norm(heading, axis=1, keepdims=True)
            reach = length * person.scale * rng.uniform(0.75, 1.25, (len(start), 1))
            steps = max(int(length / 2.2), 2)
            along = (np.arange(steps) + 0.5) / steps
            way = start[:, None] + (heading * reach)[:, None] * along[None, :, None]
            spread = rng.normal(0, radius * 0.45, way.shape)
            calibre = np.pi * (radius * person.vessel_gain) ** 2
            points.append((way + spread).reshape(-1, 3))
            volumes.append(np.repeat(calibre * reach[:, 0] / steps, steps))
            end = start + heading * reach
            start = np.concatenate([end, end])
            heading = np.concatenate([heading, heading]) + rng.normal(0, 0.5, (2 * len(end), 3))
    filled = canvas.splat(np.concatenate(points), np.concatenate(volumes))
    canvas.hu += filled * canvas.lung * (np.float32(person.blood_hu) - canvas.hu)


def aorta_path(person: Person) -> tuple[list[Point], list[float]]:
    """Centre line (z, y, x) mm and radii (mm) of the aorta, from its root over the arch down to the diaphragm."""
    s, r = person.scale, person.aorta_radius
    points: list[Point] = [
        (-18 * s, -18 * s, -2 * s),
        (5 * s, -24 * s, -17 * s),
        (30 * s, -20 * s, -21 * s),
        (47 * s, -12 * s, -15 * s),
        (58 * s, 2 * s, 6 * s),
        (60 * s, 16 * s, 22 * s),
        (52 * s, 30 * s, 30 * s),
        (34 * s, 40 * s, 28 * s),
        (-20 * s, 42 * s, 24 * s),
        (-80 * s, 40 * s, 17 * s),
        (-150 * s, 34 * s, 8 * s),
        (-230 * s, 32 * s, 5 * s),
    ]
    return points, [r, r, r, 0.95 * r, 0.92 * r, 0.9 * r, 0.86 * r, 0.82 * r, 0.78 * r, 0.75 * r, 0.72 * r, 0.7 * r]


def paint_mediastinum(canvas: Canvas, person: Person) -> None:
    """Paints great vessels, oesophagus, trachea and main bronchi."""
    s, blood = person.scale, person.blood_hu
    canvas.tube([(120 * s, 30 * s, 3 * s), (-90 * s, 34 * s, 8 * s)], [7 * s, 7 * s], 32.0)
    canvas.tube([(95 * s, 2 * s, -22 * s), (45 * s, -2 * s, -28 * s), (-20 * s, -4 * s, -30 * s)], [9, 10, 11], blood)
    canvas.tube([(97 * s, 0.0, 30 * s), (57 * s, 4 * s, 12 * s)], [5 * s, 6 * s], blood)
    # pulmonary trunk and its two branches
    right, left = hilum(person, -1.0), hilum(person, 1.0)
    canvas.tube([(-14 * s, -38 * s, 14 * s), (16 * s, -18 * s, 20 * s), left], [14 * s, 13 * s, 9 * s], blood)
    canvas.tube([(16 * s, -18 * s, 18 * s), (12 * s, -2 * s, -14 * s), right], [12 * s, 10 * s, 8 * s], blood)
    for side in (-1.0, 1.0):
        z, y, x = hilum(person, side)
        canvas.tube([(z, y, x), (z - 32 * s, y + 8 * s, x + side * 12 * s)], [8 * s, 4 * s], blood)
    points, radii = aorta_path(person)
    canvas.tube(points, radii, blood)
    top: Point = (170 * s, 16 * s, 0.0)
    carina: Point = (36 * s, 14 * s, -2 * s)
    ends = [(8 * s, 12 * s, -40 * s), (4 * s, 16 * s, 42 * s)]
    canvas.tube([top, carina], [11 * s, 11 * s], 25.0)
    canvas.tube([top, carina], [8.6 * s, 8.6 * s], -980.0)
    for end in ends:
        canvas.tube([carina, end], [8 * s, 7 * s], 20.0, solid=False)
        canvas.tube([carina, end], [6.6 * s, 5 * s], -970.0, solid=False)


def heart_frame(person: Person) -> tuple[Point, Point, Numbers]:
    """Centre (z, y, x) mm, semi-axes in mm and axes (3, 3) of the heart; the first axis points to the apex."""
    s, size = person.scale, person.heart_scale
    grow = s * size
    # An enlarged heart grows to the left and down; its base stays where the great vessels hold it.
    extra = (size - 1) * 34 * s
    centre: Point = (person.dome_left + 43 * s * size**0.4 - 0.2 * extra, -20 * s, person.heart_shift * s + extra)
    tilt = 0.55 + person.heart_turn
    apex = np.array([-np.sin(tilt), -0.5, np.cos(tilt)])
    apex /= np.linalg.norm(apex)
    second = np.cross(apex, [0.0, 1.0, 0.0])
    second /= np.linalg.norm(second)
    axes = np.stack([apex, second, np.cross(apex, second)])
    return centre, (64 * grow, 50 * grow, 44 * grow), axes


def paint_heart(canvas: Canvas, person: Person, fluid: float = 0.0) -> None:
    """Paints the heart in its fat; `fluid` is the thickness in mm of an effusion in the pericardium."""
    centre, (a, b, c), axes = heart_frame(person)
    s = person.scale * person.heart_scale
    right: Point = (centre[0] + 4 * s, centre[1] + 10 * s, centre[2] - 33 * s)
    # from outside: fat, the fluid in its sac, the fat that carries the coronary arteries, muscle
    layers = [(5.0, -90.0), (0.0, 42.0)]
    if fluid:
        layers = [(fluid + 6.0, -90.0), (fluid + 3.0, WATER), (3.0, -90.0), layers[1]]
    for extra, value in layers:
        canvas.ellipsoid(centre, (a + extra, b + extra, c + extra), value, axes)
        canvas.ellipsoid(right, (38 * s + extra, 30 * s + extra, 26 * s + extra), value)
    blood = person.blood_hu
    offset = np.asarray(axes[0]) * 0.12 * a
    left_centre: Point = (centre[0] + offset[0] + 2, centre[1] + offset[1] + 10 * s, centre[2] + offset[2] + 10 * s)
    canvas.ellipsoid(left_centre, (0.62 * a, 0.4 * b, 0.42 * c), blood, axes)
    canvas.ellipsoid(right, (33 * s, 25 * s, 22 * s), blood)
    canvas.ellipsoid((centre[0] + 2 * s, centre[1] - 20 * s, centre[2] - 8 * s), (26 * s, 15 * s, 34 * s), blood)
    canvas.ellipsoid((centre[0] + 24 * s, centre[1] + 34 * s, centre[2] - 6 * s), (22 * s, 18 * s, 30 * s), blood)

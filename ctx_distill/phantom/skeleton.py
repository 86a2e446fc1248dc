"""The bones: spine, ribs with their cartilage, breastbone, collarbones, shoulder blades and upper arms."""

from __future__ import annotations

import numpy as np

from ctx_distill.phantom.anatomy import Person
from ctx_distill.phantom.canvas import Canvas, Numbers

Points = Numbers


def paint_bones(canvas: Canvas, person: Person, arms_up: bool) -> None:
    """Paints the skeleton over everything else."""
    _paint_spine(canvas, person)
    parts = [_ribs(person), _sternum(person), *(_scapula(person, side, arms_up) for side in (-1.0, 1.0))]
    filled = canvas.splat(np.concatenate([p for p, _ in parts]), np.concatenate([v for _, v in parts]))
    canvas.hu += filled * (np.float32(person.bone_hu) - canvas.hu)
    canvas.lung *= 1 - filled
    s, top = person.scale, person.lung_top
    for side in (-1.0, 1.0):
        height = top - 16 * s
        front = float(person.middle(height) - person.half_depth(height)) - 10 * s
        end = (top + (14 if arms_up else 4) * s, 14 * s, side * (person.cage_width + 2 * s))
        bend = (top - 10 * s, front + 4 * s, side * 62 * s)
        canvas.tube([(height, front, side * 17 * s), bend, end], [6.5 * s, 5.5 * s, 6 * s], person.bone_hu)
        if not arms_up:
            head = (top - 18 * s, 16 * s, side * (person.cage_width + 22 * s))
            shaft = (top - 150 * s, 12 * s, side * (person.cage_width + 58 * s + person.fat))
            canvas.tube([head, shaft], [21 * s, 12 * s], 0.7 * person.bone_hu)


def _paint_spine(canvas: Canvas, person: Person) -> None:
    s = person.scale
    at = canvas.box((-300, 30 * s, -45 * s), (300, 140 * s, 45 * s))
    if at is None:
        return
    z, y, x = canvas.coordinates(at)
    axis = person.middle(z) * np.float32(0.8) + np.float32(63 * s)
    radius = np.sqrt((x / np.float32(18 * s)) ** 2 + ((y - axis) / np.float32(16 * s)) ** 2)
    period = np.float32(24 * s)
    phase = np.abs(np.mod(z / period, 1) - np.float32(0.5)) * 2
    # The discs between the bodies: a quarter of the height, softened over a voxel.
    body = np.clip((phase - np.float32(0.22)) * period / np.float32(2 * canvas.soft) + np.float32(0.5), 0, 1)
    density = np.float32(85) + body * np.float32(0.38 * person.bone_hu - 85)
    canvas.blend(at, canvas.edge((1 - radius) * np.float32(17 * s)), np.broadcast_to(density, radius.shape))
    shell = canvas.edge(np.float32(1.6) - np.abs(radius - np.float32(0.95)) * np.float32(17 * s)) * body
    canvas.blend(at, shell * np.float32(0.4), person.bone_hu)
    arch = np.sqrt((x / np.float32(14 * s)) ** 2 + ((y - axis - np.float32(25 * s)) / np.float32(12 * s)) ** 2)
    ring = canvas.edge((1 - arch) * np.float32(12 * s)) * (np.float32(0.3) + np.float32(0.4) * body)
    canvas.blend(at, ring, 0.5 * person.bone_hu)
    canal = np.sqrt(x**2 + (y - axis - np.float32(24 * s)) ** 2)
    canvas.blend(at, canvas.edge(np.float32(8 * s) - canal), 30.0)
    spinous = np.maximum(np.abs(x) - 3, np.abs(y - axis - np.float32(44 * s)) - np.float32(12 * s))
    canvas.blend(at, canvas.edge(-spinous) * body, 0.45 * person.bone_hu)
    wings = np.maximum(np.abs(x) - np.float32(31 * s), np.abs(y - axis - np.float32(24 * s)) - np.float32(4 * s))
    canvas.blend(at, canvas.edge(-wings) * np.clip(body * 3 - 2, 0, 1) * (canal > 10 * s), 0.6 * person.bone_hu)


def _outline(person: Person, z: Points, angle: Points, outside: float) -> tuple[Points, Points]:
    """(y, x) on the cage at heights z, `outside` mm out of the pleura, at angles from the back (0) to the front."""
    width, depth = person.half_width(z) + outside, person.half_depth(z) + outside
    sin, cos = np.sin(angle), np.cos(angle)
    # the radius at which the squircle of `thorax.squircle` (squareness 0.4) meets 1 in this direction
    a = 0.4 * sin**2 * cos**2
    square = np.where(a > 1e-6, (1 - np.sqrt(np.maximum(1 - 4 * a, 0))) / np.maximum(2 * a, 1e-9), 1.0)
    reach = np.sqrt(square)
    return person.middle(z) + depth * cos * reach, width * sin * reach


def _ribs(person: Person) -> tuple[Points, Numbers]:
    """Points (n, 3) in (z, y, x) mm and their volumes (n,) in mm3."""
    s, points, volumes = person.scale, [], []
    for rank in range(12):
        back = person.lung_top + 2 * s - rank * (person.lung_top - person.lung_base) * 0.083
        drop = (24 + 8.5 * min(rank, 7)) * s
        stop = (0.955 if rank < 7 else 0.86 - 0.07 * (rank - 7)) * np.pi
        length = 2.1 * float(person.half_width(back) + person.half_depth(back)) * stop / np.pi
        steps = max(int(length / 2.6), 8)
        angle = np.linspace(0.2, stop, steps)
        fall = np.clip(angle / (0.75 * np.pi), 0, 1.2)
        z = back - drop * fall**1.15 + (14 * s * np.clip(angle / np.pi - 0.8, 0, 1) / 0.2 if rank < 7 else 0)
        cartilage = np.clip((angle / np.pi - 0.74) / 0.03, 0, 1)
        for outside in (2.2, 5.2):
            y, x = _outline(person, z, angle, outside * s)
            for up in (-4.6, -1.6, 1.6, 4.6):
                # The upper and lower rim are thicker, as the cortex is: a rib shows as two lines on a film.
                share = (1.15 if abs(up) > 2 else 0.7) * (1 - 0.72 * cartilage)
                for side in (-1.0, 1.0):
                    points.append(np.stack([z + up * s, y, side * x], axis=1))
                    volumes.append(share * (length / steps) * 3.1 * s * 4.2 * s)
    return np.concatenate(points), np.concatenate(volumes)


def _sternum(person: Person) -> tuple[Points, Numbers]:
    s = person.scale
    z, x = np.meshgrid(np.arange(-62 * s, person.lung_top - 22 * s, 3.0), np.arange(-17, 17.1, 3.0) * s, indexing="ij")
    width = np.interp(z, [-62 * s, -40 * s, 60 * s, 75 * s, 100 * s], [9 * s, 15 * s, 13 * s, 22 * s, 24 * s])
    keep = np.abs(x) <= width
    z, x = z[keep], x[keep]
    front = person.middle(z) - person.half_depth(z)
    layers = [np.stack([z, front - off * s, x], axis=1) for off in (3.0, 6.5, 10.0)]
    return np.concatenate(layers), np.full(3 * len(z), 0.55 * 3.0 * 3.0 * s * 3.5 * s)


def _scapula(person: Person, side: float, arms_up: bool) -> tuple[Points, Numbers]:
    s, top = person.scale, person.lung_top
    out = 12 * s if arms_up else 18 * s
    edge = person.cage_width + out
    corners = np.array([[top - 28 * s, edge], [top - 30 * s, edge - 66 * s], [top - 140 * s, edge - 30 * s]])
    u, v = np.meshgrid(np.linspace(0, 1, 34), np.linspace(0, 1, 34))
    keep = u + v <= 1
    u, v = u[keep][:, None], v[keep][:, None]
    flat = corners[0] + u * (corners[1] - corners[0]) + v * (corners[2] - corners[0])
    z, x = flat[:, 0], flat[:, 1]
    reach = np.clip(1 - (x / (edge + 14 * s)) ** 2, 0, 1)
    y = person.middle(z) + (person.half_depth(z) + 16 * s) * np.sqrt(reach)
    area = 0.5 * 66 * 112 * s * s / len(z)
    thick = np.where((u[:, 0] < 0.06) | (v[:, 0] < 0.05) | (u[:, 0] + v[:, 0] > 0.95), 7.0, 2.6)
    return np.stack([z, y, side * x], axis=1), thick * area

"""A reader that needs no model: its values are plain functions of the voxels, so that a test can compute them too."""

from __future__ import annotations

import os
import time

import numpy as np

from ctx_distill.data.io.volume import Volume
from ctx_distill.errors import InputError
from ctx_distill.explorer.answers import About, Answer, FindingAnswer, SaliencyMap, ShownXray, Tell


class FakeReader:
    """`mode`: "" answers; "slow" sleeps a minute over scans that are brighter than 1000 somewhere; "dies" likewise ends."""

    def __init__(self, mode: str) -> None:
        if mode == "broken":
            raise InputError("runs/x: no such model")
        self.mode = mode
        self.about = About({"Model": "a fake"}, nearest="Nearest by nothing.")

    def read(self, scan: Volume, tell: Tell) -> Answer:
        tell("encoding")
        if scan.voxels.max() > 1000:
            if self.mode == "slow":
                time.sleep(60)
            if self.mode == "dies":
                os._exit(11)
        tell("saliency")
        values = np.zeros((2, 2, 2), np.float32)
        values[1, 1, 0] = 2.0
        corner = scan.affine_lps @ np.diag([*(np.array(scan.voxels.shape) / 2), 1.0])
        return Answer(
            [
                FindingAnswer("Low", 0.25),
                FindingAnswer("Bright", float(np.clip(scan.voxels.mean() / 1000, 0, 1)), SaliencyMap(values, corner)),
            ],
            "A <b>draft</b>.",
            [ShownXray(0.5, ["Effusion"])],
        )


def open_fake(mode: str) -> FakeReader:
    """The opener."""
    return FakeReader(mode)

"""How a CT encoder is computed in training: none of it changes what the weights mean, so none is in an artefact."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import torch

from ctx_distill.errors import InputError


@dataclass(frozen=True)
class ComputeSettings:
    """Memory and speed of the CT encoder in training.

    Attributes:
        checkpointing: compute each block again in backward and keep only its input (Chen et al. 2016, arXiv 1604.06174):
            about a third more time, for the activations of one block in place of all.
        compile: compile the encoder in training (torch.compile); evaluation, whose batches differ in size, runs as
            written. On a CPU it needs a C++ compiler.
        channels_last: voxels outside, channels inside, in memory, as tensor cores want convolutions. None: for a
            convolutional encoder that is compiled on a GPU (torch's own group norm would copy back and forth).
    """

    checkpointing: bool = False
    compile: bool = False
    channels_last: bool | None = None


def check_compiler(settings: ComputeSettings, device: torch.device) -> None:
    """Check that there is what torch.compile needs on a CPU.

    Raises:
        InputError: no C++ compiler is found.
    """
    compiler = os.environ.get("CXX", "g++")
    if settings.compile and device.type == "cpu" and shutil.which(compiler) is None:
        raise InputError(
            f"compute.compile is true on a CPU, where torch.compile needs a C++ compiler; {compiler} is not on the PATH. "
            "Install one (Debian: g++), or set --model.init_args.compute.compile=false."
        )

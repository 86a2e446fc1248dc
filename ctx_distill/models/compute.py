"""Settings of how a CT encoder is computed in training; they do not affect the weights and are not in artefacts."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import torch

from ctx_distill.errors import InputError


@dataclass(frozen=True)
class ComputeSettings:
    """Memory and speed settings of the CT encoder in training.

    Attributes:
        checkpointing: recompute each block in the backward pass and keep only its input (Chen et al. 2016, arXiv
            1604.06174). Takes about a third more time, and stores the activations of one block instead of all.
        compile: compile the encoder in training (torch.compile). Evaluation, with varying batch sizes, is not compiled.
            Needs a C++ compiler on a CPU.
        channels_last: use the channels-last memory format, which tensor cores prefer for convolutions. None enables it
            for convolutional encoders that are compiled on a GPU (torch's group norm would otherwise copy).
    """

    checkpointing: bool = False
    compile: bool = False
    channels_last: bool | None = None


def check_compiler(settings: ComputeSettings, device: torch.device) -> None:
    """Check the requirements of torch.compile on a CPU.

    Raises:
        InputError: no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if settings.compile and device.type == "cpu" and shutil.which(compiler) is None:
        raise InputError(
            f"compute.compile is true on a CPU, where torch.compile needs a C++ compiler; {compiler} is not on the PATH. "
            "Install one (Debian: g++), or set --model.init_args.compute.compile=false."
        )

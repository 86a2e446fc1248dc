"""The machine by name, and the environment in which the parts run."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.wheels import install, join, missing_pieces

PROBE = """
import importlib.metadata, json, os, sys
import torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
if facts["gpus"]:
    properties = torch.cuda.get_device_properties(0)
    facts |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
              "multiprocessors": properties.multi_processor_count,
              "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
              "cudnn": torch.backends.cudnn.version()}
try:
    import faiss
    facts["faiss"] = faiss.__version__
    facts["faiss_gpus"] = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
except Exception as error:
    facts["faiss_error"] = f"{type(error).__name__}: {error}"[:300]
for name in ("torchvision", "lightning", "transformers", "monai", "numpy", "triton"):
    try:
        facts[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        facts[name] = None
print(json.dumps(facts))
"""


def hardware() -> dict[str, Any]:
    """Processor, memory, GPU and driver, as the system names them; nothing heavy is imported."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    facts: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)), "processor": models[0] if models else platform.processor(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(), "kernel": platform.release(),
    }  # fmt: skip
    if shutil.which("nvidia-smi"):
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        facts["nvidia_smi"] = asked.stdout.strip() or asked.stderr.strip()
        if asked.returncode == 0 and asked.stdout.count(",") >= 2:
            facts["driver"] = asked.stdout.splitlines()[0].split(",")[1].strip()
    return facts


def code_version(repo: Path) -> str | None:
    """The commit of the working tree, with `+` where it was changed; None where git does not know."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(repo), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


class Environment:
    """Folders for PYTHONPATH, installed from the wheels, with one FAISS: two in one path are refused by the package.

    Args:
        repo: root of the working tree.
        wheels: folder that `make gpu-wheels` filled; None: the interpreter has all packages.
        work: where the packages are unpacked.
        device: `cuda` or `cpu`.
    """

    def __init__(self, repo: Path, wheels: Path | None, work: Path, device: str) -> None:
        self.repo, self.device = repo, device
        self.folders: list[Path] = []
        self.notes: list[str] = []
        self.faiss_gpu = False
        gpu_folder: Path | None = None
        if wheels is not None:
            base = sorted([*wheels.glob("base/*.whl"), *wheels.glob("simpleitk/*.whl")])
            if not base:
                raise SystemExit(f"{wheels}: no wheels in base/; run make gpu-wheels, or carry that folder over")
            faiss = [wheel for wheel in base if wheel.name.startswith("faiss_cpu-")]
            install([wheel for wheel in base if wheel not in faiss], work / "site")
            install(faiss, work / "site-faiss-cpu")
            self.folders = [work / "site", work / "site-faiss-cpu"]
            gpu_folder = self._faiss_for_gpus(wheels, work)
        self.facts = self._probe(self.folders)
        if gpu_folder is not None:
            self._choose(gpu_folder, work)
        elif device == "cuda":
            self.faiss_gpu = bool(self.facts.get("faiss_gpus"))

    def _faiss_for_gpus(self, wheels: Path, work: Path) -> Path | None:
        short = missing_pieces(wheels, "faiss-gpu")
        if short:
            self.notes.append(f"FAISS for GPUs is not installed: {short}")
            return None
        try:
            install(join(wheels, "faiss-gpu", work / "joined"), work / "site-faiss-gpu")
        except (ValueError, SystemExit) as error:
            self.notes.append(f"FAISS for GPUs is not installed: {error}")
            return None
        return work / "site-faiss-gpu"

    def _choose(self, folder: Path, work: Path) -> None:
        facts = self._probe([work / "site", folder])
        if "faiss_error" in facts:
            self.notes.append(f"FAISS for GPUs cannot be imported: {facts['faiss_error']}")
        elif self.device == "cuda" and not facts["faiss_gpus"]:
            self.notes.append("FAISS for GPUs is imported and sees no GPU")
        elif self.device == "cpu":
            self.notes.append("FAISS for GPUs can be imported; the parts run with FAISS for CPUs")
        else:
            self.facts, self.folders, self.faiss_gpu = facts, [work / "site", folder], True

    def variables(self, folders: list[Path] | None = None) -> dict[str, str]:
        """The environment variables of a process."""
        path = [self.repo, self.repo / "benchmarks", *(self.folders if folders is None else folders)]
        inherited = os.environ.get("PYTHONPATH")
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *([inherited] if inherited else [])]),
                "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **hidden}  # fmt: skip

    def _probe(self, folders: list[Path]) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, env=self.variables(folders)
        )
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "the probe failed"}
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return facts

"""`ctx_distill.load` and `ctx-distill predict` import only what they use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

UNUSED = {"lightning", "torchmetrics", "pandas", "pyarrow", "sklearn", "faiss", "monai", "transformers", "open_clip",
          "torchvision", "SimpleITK", "peft", "nltk", "sacrebleu", "jsonargparse"}  # fmt: skip


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted({UNUSED!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_the_modules_of_inference_import_no_library_of_training() -> None:
    assert not loaded_by("import ctx_distill.inference.batch")
    assert not loaded_by("import ctx_distill.inference.model, ctx_distill.inference.parts")


@pytest.mark.full
def test_a_loaded_model_has_imported_nothing_of_training_or_search(finished_run: Path) -> None:
    """MONAI and open_clip are in the model; they bring torchvision, transformers and pandas."""
    loaded = loaded_by(f"import ctx_distill\nctx_distill.load({str(finished_run)!r})")
    assert not loaded & {"lightning", "torchmetrics", "faiss", "SimpleITK", "jsonargparse", "sacrebleu", "nltk"}

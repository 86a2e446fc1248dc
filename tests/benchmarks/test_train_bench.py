"""The training benchmarks at tiny sizes: tables are whole; operations and bytes agree with a count by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import train

    return train


def test_operations_of_a_vit_are_those_counted_by_hand(bench: Any) -> None:
    from train_flops import step_flops

    pytest.importorskip("einops", reason="MONAI's ViT needs einops")
    shape, width, depth = (16, 32, 32), 128, 4
    tokens, voxels = 2 * 4 * 4, 8**3
    patches = 2 * tokens * voxels * width
    attention = 2 * tokens * width * 3 * width + 2 * (2 * tokens * tokens * width) + 2 * tokens * width * width
    block = attention + 2 * (2 * tokens * width * 4 * width)
    forward, whole = step_flops(bench.encoder_of("vit_tiny", shape, 8), shape)
    assert forward == patches + depth * block
    # Backward costs twice the forward, but the volume itself has no gradient.
    assert whole == 2 * patches + 3 * depth * block


def test_operations_of_a_resnet_are_those_counted_by_hand(bench: Any) -> None:
    from train_flops import step_flops

    encoder = bench.encoder_of("resnet_tiny", (16, 32, 32), 8)
    found: list[int] = []

    def count(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        assert isinstance(module, torch.nn.Conv3d)
        kernel = module.kernel_size[0] * module.kernel_size[1] * module.kernel_size[2]
        found.append(2 * output[0, 0].numel() * kernel * module.in_channels * module.out_channels)

    handles = [m.register_forward_hook(count) for m in encoder.modules() if isinstance(m, torch.nn.Conv3d)]
    encoder(torch.zeros(1, 1, 16, 32, 32))
    for handle in handles:
        handle.remove()
    forward, whole = step_flops(encoder, (16, 32, 32))
    assert forward == sum(found)
    assert whole == 3 * sum(found) - found[0]


def test_kept_bytes_of_a_vit_grow_with_its_tokens_and_leave_attention_matrices_out(bench: Any) -> None:
    from train_flops import kept_bytes

    pytest.importorskip("einops", reason="MONAI's ViT needs einops")
    small, large = (kept_bytes(bench.encoder_of("vit_tiny", shape, 8), shape) for shape in ((32, 32, 32), (32, 64, 64)))
    assert large == pytest.approx(4 * small, rel=0.02)
    # qkv and the two products' inputs, hidden layer of the MLP before and after its GELU: 2 bytes a number, 4 blocks.
    assert small > 64 * 128 * 2 * 4 * (3 + 2 + 4 + 4)


def row(kind: str, encoder: str, rate: float, **other: Any) -> dict[str, Any]:
    return {
        "name": kind, "kind": kind, "encoder": encoder, "shape": [1, 2, 3], "volumes_s": rate, "wait_share": 0.01,
        "lookup_share": 0.005, "utilisation": 0.5, "memory_gb": 50.0, "precision": "bf16-mixed", "compile": True, **other,
    }  # fmt: skip


def test_targets_are_reached_or_not(bench: Any) -> None:
    plain = [row("plain", name, 4.0, precision="32-true", compile=False) for name in ("vit_b", "resnet50")]
    compiled = row("plain", "resnet50", 10.0)
    good = [row("align", "vit_b", 9.0), row("distill", "resnet50", 9.6), row("cached", "vit_b", 1.0)]
    said = bench.targets([*plain, compiled, *good])
    assert len(said) == 3 + 3 + 1
    assert not [line for line in said if "NOT reached" in line]
    bad = [
        row("align", "vit_b", 7.9, wait_share=0.02, utilisation=0.44), row("distill", "resnet50", 9.4),
        row("cached", "vit_b", 1.0, memory_gb=60.1), {"error": "out of memory"},
    ]  # fmt: skip
    said = bench.targets([*plain, compiled, *bad])
    assert [line.endswith("NOT reached") for line in said] == [True, True, True, False, False, True, True]


def test_the_large_batch_is_estimated_from_its_parts(bench: Any) -> None:
    parts = bench.estimate("resnet_tiny", (16, 32, 32), 8, 8)
    assert parts["all"] == pytest.approx(sum(value for name, value in parts.items() if name != "all"))
    weights = sum(p.numel() for p in bench.encoder_of("resnet_tiny", (16, 32, 32), 8).parameters())
    assert parts["weights, gradients, AdamW in float32"] == 16 * weights
    assert bench.estimate("resnet_tiny", (16, 32, 32), 8, 16)["activations of a micro-batch"] == (
        2 * parts["activations of a micro-batch"]
    )


@pytest.mark.full
@pytest.mark.ddp
def test_both_tables_are_whole(tmp_path: Path) -> None:
    pytest.importorskip("einops", reason="MONAI's ViT needs einops")
    data = tmp_path / "data"

    def run(script: str, *options: str) -> tuple[dict[str, Any], str]:
        out = tmp_path / f"{script}.json"
        command = [sys.executable, str(FOLDER / f"{script}.py"), *options, "--index-rows", "500", "--embed-dim", "64",
                   "--batch", "2", "--data", str(data), "--out", str(out)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(out.read_text()), done.stdout

    given = ["--shapes", "16x32x32", "--encoders", "vit_tiny", "resnet_tiny", "--patch", "8", "--threads", "1",
             "--warmup", "1", "--steps", "3"]  # fmt: skip
    table, printed = run("train", *given)
    rows = table["rows"]
    assert not [each for each in rows if "error" in each]
    kinds = [(each["encoder"], each["kind"], each["precision"]) for each in rows]
    if not table["gpu"]:
        assert kinds == [
            ("vit_tiny", "distill", "32-true"), ("vit_tiny", "align", "32-true"), ("vit_tiny", "plain", "32-true"),
            ("vit_tiny", "plain", "bf16-mixed"), ("resnet_tiny", "distill", "32-true"),
            ("resnet_tiny", "align", "32-true"), ("resnet_tiny", "plain", "32-true"),
        ]  # fmt: skip
        assert "Not run without a GPU" in printed
    for each in rows:
        assert each["volumes_s"] == pytest.approx(each["batch"] / each["step_s"])
        assert each["utilisation"] == pytest.approx(each["volumes_s"] * each["flops"] / each["matmul_flops_s"])
        assert 0 <= each["wait_share"] + each["lookup_share"] < 1
        assert (each["lookup_share"] > 0) == (each["kind"] == "distill")
        assert (each["wait_share"] > 0) == (each["kind"] != "plain")
    assert len(table["estimates"]) == 2

    table, _ = run("processes", "--encoder", "resnet_tiny", "--shape", "16", "32", "32", "--worlds", "1", "2",
                   "--stages", "align", "--warmup", "1", "--steps", "1")  # fmt: skip
    assert [(each["stage"], each["processes"]) for each in table["rows"]] == [("align", 1), ("align", 2)]
    one, two = table["rows"]
    assert one["gather_share"] == 0
    assert 0 < two["gather_share"] <= two["gather_share_largest"] < 1
    assert two["volumes_s"] == pytest.approx(2 * 2 / two["step_s"])

"""Cached gradients: NumPy oracle, the plain step, dropout, memory, two ranks, and GradCache's own loop beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F

from ctx_distill import distributed
from ctx_distill.losses.contrastive import contrastive_loss
from ctx_distill.training.gradient_cache import encode_cached

CPU = torch.device("cpu")
STUDY = torch.tensor([4, 7, 4, 9, 7, 4, 1, 3, 8, 9, 2])


class Towers(nn.Module):
    """Two small towers with dropout, a temperature, and rows of volumes (b, 1, 4, 4, 4) and texts (b, 6)."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        self.image = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU(), nn.Dropout(dropout), nn.Flatten(),
            nn.Linear(512, 5, bias=False),
        )  # fmt: skip
        self.text = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5, bias=False))
        self.log_scale = nn.Parameter(torch.tensor(1.3))
        self.to(dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))

    def forward(self, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return F.normalize(self.image(rows[0]), dim=-1), F.normalize(self.text(rows[1]), dim=-1)


def data(rows: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    volumes = torch.randn(rows, 1, 4, 4, 4, generator=draw, dtype=torch.float64)
    return volumes.to(dtype), torch.randn(rows, 6, generator=draw, dtype=torch.float64).to(dtype)


def parts_of(rows: Sequence[Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(rows[0].split(size), rows[1].split(size), strict=True))


def encode_plainly(towers: Towers, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """All micro-batches in one graph."""
    return tuple(torch.cat(part) for part in zip(*map(towers, parts), strict=True))


def gradients(towers: Towers, features: tuple[Tensor, ...], study: Tensor = STUDY) -> list[Tensor]:
    loss = contrastive_loss(*features, towers.log_scale.exp(), study=study)["total"]
    towers.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in towers.parameters())]


def assert_same(values: Sequence[Tensor], expected: Sequence[Tensor], atol: float = 1e-10) -> None:
    assert len(values) == len(expected)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=atol)


def test_oracle_of_a_linear_encoder() -> None:
    draw = np.random.default_rng(0)
    x, weight, gradient = draw.normal(size=(7, 3)), draw.normal(size=(3, 2)), draw.normal(size=(7, 2))
    learnt = torch.tensor(weight, requires_grad=True)
    (features,) = encode_cached(lambda part: (part @ learnt,), torch.tensor(x).split(3), [learnt], CPU)
    np.testing.assert_allclose(features.detach(), x @ weight, atol=1e-12)
    features.backward(torch.tensor(gradient))
    np.testing.assert_allclose(learnt.grad, x.T @ gradient, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4, 10, 11])
def test_same_loss_and_gradients_as_the_whole_batch_at_once(size: int) -> None:
    towers, rows = Towers(), data()
    expected = gradients(towers, towers(rows))
    assert_same(gradients(towers, encode_cached(towers, parts_of(rows, size), towers.parameters(), CPU)), expected)


def test_gradients_by_finite_differences() -> None:
    x = data(7)[1]
    weights = [torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]

    def loss(first: Tensor, second: Tensor) -> Tensor:
        def encode(part: Tensor) -> tuple[Tensor, ...]:
            return F.normalize(part @ first, dim=-1), F.normalize((part @ second).tanh(), dim=-1)

        return contrastive_loss(*encode_cached(encode, x.split(3), (first, second), CPU), 4.0)["total"]

    assert torch.autograd.gradcheck(loss, [weight.requires_grad_() for weight in weights])


def test_dropout_draws_in_the_second_pass_what_it_drew_in_the_first() -> None:
    towers, parts = Towers(dropout=0.4), parts_of(data(), 3)
    torch.manual_seed(5)
    expected = gradients(towers, encode_plainly(towers, parts))
    after = torch.rand(3)
    torch.manual_seed(5)
    assert_same(gradients(towers, encode_cached(towers, parts, towers.parameters(), CPU)), expected)
    assert torch.equal(torch.rand(3), after)  # the replay leaves the generator where the first pass did
    towers.eval()
    without = gradients(towers, encode_plainly(towers, parts))
    assert not torch.allclose(without[1], expected[1], atol=1e-3)


@pytest.mark.gpu
def test_dropout_is_replayed_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    towers, parts = Towers(dropout=0.4).to(device), [(x.to(device), y.to(device)) for x, y in parts_of(data(), 3)]
    study = STUDY.to(device)
    torch.manual_seed(5)
    expected = gradients(towers, encode_plainly(towers, parts), study)
    after = torch.rand(3, device=device)
    torch.manual_seed(5)
    assert_same(gradients(towers, encode_cached(towers, parts, towers.parameters(), device), study), expected)
    assert torch.equal(torch.rand(3, device=device), after)


def test_a_step_may_be_differentiated_after_others_have_drawn() -> None:
    towers, parts = Towers(dropout=0.4), parts_of(data(), 4)
    results = []
    for between in (0, 100):
        torch.manual_seed(5)
        features = encode_cached(towers, parts, towers.parameters(), CPU)
        torch.rand(between)
        results.append(gradients(towers, features))
    assert_same(results[1], results[0], atol=0)


def test_rows_of_terms_and_of_counts_go_through() -> None:
    """What an additive loss needs: a mean over tokens of the whole batch, not a mean of micro-batches' means."""
    towers, rows = Towers(), data()

    def encode(part: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        image, text = towers(part)
        return image, text, towers.image(part[0]).square().sum(1), (part[1] > 0).sum(1)

    results = []
    for image, text, term, count in (encode(rows), encode_cached(encode, parts_of(rows, 3), towers.parameters(), CPU)):
        assert not count.requires_grad
        loss = contrastive_loss(image, text, towers.log_scale.exp())["total"] + (term * count).sum() / count.sum()
        towers.zero_grad()
        loss.backward()
        results.append([loss.detach(), count, *(p.grad.clone() for p in towers.parameters())])
    assert_same(results[1], results[0])


def test_a_frozen_tower_and_parameters_not_named_get_no_gradient() -> None:
    towers, rows = Towers(), data()
    towers.text.requires_grad_(False)
    expected = contrastive_loss(*towers(rows), towers.log_scale.exp())["total"]
    expected.backward()
    plain = [p.grad for p in towers.image.parameters()]
    towers.zero_grad()
    features = encode_cached(towers, parts_of(rows, 4), towers.parameters(), CPU)
    contrastive_loss(*features, towers.log_scale.exp())["total"].backward()
    assert_same([p.grad for p in towers.image.parameters()], plain)
    assert all(p.grad is None for p in towers.text.parameters())

    towers.zero_grad()
    encode_cached(towers, parts_of(rows, 4), towers.image[0].parameters(), CPU)[0].sum().backward()
    assert [name for name, p in towers.named_parameters() if p.grad is not None] == ["image.0.weight", "image.0.bias"]


def test_the_second_pass_is_under_the_autocast_of_the_first() -> None:
    towers, rows = Towers(dtype=torch.float32), data(dtype=torch.float32)
    results = []
    for cached in (False, True):
        seen: list[torch.dtype] = []
        towers.image[0].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            features = (
                encode_cached(towers, parts_of(rows, 4), towers.parameters(), CPU)
                if cached
                else encode_plainly(towers, parts_of(rows, 4))
            )
        results.append(gradients(towers, features))
        assert seen == [torch.bfloat16] * (6 if cached else 3)
    assert_same(results[1], results[0], atol=2e-3)  # bfloat16 sums of a parameter's uses are rounded in another order


class Held:
    """Bytes that autograd holds of what one function saved."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def watched(self, encode: Callable[[Any], tuple[Tensor, ...]]) -> Callable[[Any], tuple[Tensor, ...]]:
        held = self

        class Saved:
            def __init__(self, x: Tensor) -> None:
                self.x = x
                held.now += x.nbytes
                held.peak = max(held.peak, held.now)

            def __del__(self) -> None:
                held.now -= self.x.nbytes

        def run(part: Any) -> tuple[Tensor, ...]:
            with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
                return encode(part)

        return run


@pytest.mark.parametrize("cached", [True, False])
def test_activations_do_not_grow_with_the_number_of_micro_batches(cached: bool) -> None:
    towers, peaks = Towers(), []
    for count in (2, 8, 32):
        held = Held()
        encode, parts = held.watched(towers), parts_of(data(4 * count), 4)
        features = (
            encode_cached(encode, parts, towers.parameters(), CPU)
            if cached
            else tuple(torch.cat(part) for part in zip(*map(encode, parts), strict=True))
        )
        assert (held.now == 0) == cached
        gradients(towers, features, torch.arange(4 * count))
        peaks.append(held.peak)
    assert peaks == ([peaks[0]] * 3 if cached else [peaks[0], 4 * peaks[0], 16 * peaks[0]])


def test_what_cannot_be_encoded_is_refused() -> None:
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"0 micro-batches and 1 parameters"):
        encode_cached(lambda part: (part * weight,), [], [weight], CPU)
    with pytest.raises(ValueError, match=r"1 micro-batches and 0 parameters"):
        encode_cached(lambda part: (part * weight,), [torch.ones(2)], [weight.detach()], CPU)


def rank_of_step(first: int, size: int, dropout: float) -> dict[str, Any]:
    """Gradients of this rank's step: in one graph, cached, and as GradCache's loop under DDP's `no_sync`."""
    rows, gather = data(), distributed.gather_with_gradient
    mine = slice(None)
    if distributed.world_size() > 1:
        mine = slice(0, first) if distributed.rank() == 0 else slice(first, None)
    rows, study = (rows[0][mine], rows[1][mine]), gather(STUDY[mine])

    def step(way: str) -> list[Any]:
        torch.manual_seed(distributed.rank())
        towers, parts = Towers(dropout), parts_of(rows, size)
        reduced: list[int] = []

        class Step(nn.Module):
            """What Lightning makes of a task: DDP's forward is the training step."""

            def __init__(self) -> None:
                super().__init__()
                self.towers = towers

            def forward(self, part: Any = None) -> Any:
                if part is not None:
                    return towers(part)
                return (
                    encode_cached(towers, parts, towers.parameters(), CPU)
                    if way == "cached"
                    else encode_plainly(towers, parts)
                )

        model: Any = Step()
        if distributed.world_size() > 1:
            model = nn.parallel.DistributedDataParallel(model)
            model.register_comm_hook(None, lambda _, bucket: (reduced.append(1), allreduce_hook(None, bucket))[1])

        def loss(features: tuple[Tensor, ...]) -> Tensor:
            return contrastive_loss(*map(gather, features), towers.log_scale.exp(), study=study)["total"]

        if way != "loop":
            loss(model()).backward()
        else:
            states, features = [], []
            for part in parts:
                states.append(torch.get_rng_state())
                with torch.no_grad():
                    features.append(towers(part))
            leaves = [torch.cat(part).requires_grad_() for part in zip(*features, strict=True)]
            *cached, of_scale = torch.autograd.grad(loss(tuple(leaves)), [*leaves, towers.log_scale])
            for index, (part, state) in enumerate(zip(parts, states, strict=True)):
                torch.set_rng_state(state)
                last = index == len(parts) - 1
                rows_of = slice(index * size, index * size + len(part[0]))
                with nullcontext() if last else model.no_sync():
                    products = [(x * g[rows_of]).sum() for x, g in zip(model(part), cached, strict=True)]
                    (sum(products) + last * of_scale * towers.log_scale).backward()
        return [len(reduced), *(p.grad for p in towers.parameters())]

    ways = ["plain", "cached", "loop"] if distributed.world_size() > 1 else ["plain", "cached"]
    return {way: step(way) for way in ways}


@pytest.mark.ddp
@pytest.mark.parametrize(("first", "size"), [(6, 2), (4, 3)])
def test_two_ranks_equal_one(pool: Callable[[int], Any], first: int, size: int) -> None:
    arguments = {"first": first, "size": size, "dropout": 0.0}
    expected = rank_of_step(**arguments)
    assert_same(expected["cached"][1:], expected["plain"][1:])
    for result in pool(2).run(__file__, "rank_of_step", arguments):
        for way in ("plain", "cached", "loop"):
            assert_same(result[way][1:], expected["plain"][1:])


@pytest.mark.ddp
def test_two_ranks_with_dropout_equal_the_loop_and_reduce_once(pool: Callable[[int], Any]) -> None:
    """As with `no_sync` on all but the last micro-batch, DDP reduces each bucket once a step, not once a micro-batch."""
    for result in pool(2).run(__file__, "rank_of_step", {"first": 6, "size": 2, "dropout": 0.4}):
        assert_same(result["cached"][1:], result["plain"][1:])
        assert_same(result["loop"][1:], result["plain"][1:])
        assert result["cached"][0] == result["loop"][0] == result["plain"][0] == 1

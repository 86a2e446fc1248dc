"""Cross-entropy between rows of products, computed in chunks of rows, without materialising the matrix of all logits.

    l_ij = s <q_i, k_j>,   loss = mean_i - sum_j T_ij log( exp l_ij / sum_{j' kept} exp l_ij' )

The gradient of a chunk's logits, G = p_i sum_j T_ij - T_i, is computed in place in the forward pass, together with the
gradients of q, k and s. Nothing is computed twice, and all chunks share one buffer (chunk, B) (**ours**; the idea is that
of the fused linear cross-entropy in Liger Kernel, Hsu et al. 2024, arXiv 2410.10989). With a new buffer per chunk, glibc's
fragmentation would multiply the memory of the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Rows = Callable[[int, int], Tensor | None]
"""Maps start, stop to rows (stop - start, B), or to None: all ones for the mask, the identity for targets."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, targets: Rows, keep: Rows, chunk: int, learn: bool
    ) -> Tensor:
        rows = len(queries)
        buffer = queries.new_empty(chunk, len(keys))
        total, of_scale = scale.new_zeros(()), scale.new_zeros(())
        of_queries, of_keys = (torch.zeros_like(x) if learn else x for x in (queries, keys))
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            block, diagonal = queries[start:stop], torch.arange(stop - start, device=queries.device)
            logits = torch.mm(block, keys.T, out=buffer[: stop - start]).mul_(scale)
            kept, target = keep(start, stop), targets(start, stop)
            if kept is not None:
                logits.masked_fill_(~kept, -torch.inf)
            logits.sub_(logits.amax(1, keepdim=True))
            if target is None:
                mass = torch.ones_like(logits[:, :1])
                of_positives = logits[diagonal, diagonal + start]
            else:
                target = target.to(logits.dtype)
                mass = target.sum(1, keepdim=True)
                # 0 * -inf of an excluded pair would be NaN.
                of_positives = torch.where(target > 0, logits, 0.0).mul_(target).sum(1)
            p = logits.exp_()
            denominator = p.sum(1, keepdim=True)
            total += (mass * denominator.log()).sum() - of_positives.sum()
            if not learn:
                continue
            gradient = p.mul_(mass / denominator)
            if target is None:
                gradient[diagonal, diagonal + start] -= 1
            else:
                gradient.sub_(target)
            of_block = torch.mm(gradient, keys, out=of_queries[start:stop])
            of_scale += (of_block * block).sum()
            of_keys.addmm_(gradient.T, block)
        if learn:
            ctx.save_for_backward(of_queries.mul_(scale / rows), of_keys.mul_(scale / rows), of_scale / rows)
        return total / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return (*(outer[0] * gradient for gradient in ctx.saved_tensors), None, None, None, None)


def chunked_cross_entropy(
    queries: Tensor, keys: Tensor, scale: Tensor, targets: Rows, keep: Rows, chunk: int
) -> Tensor:
    """Return the cross-entropy, with gradients for queries, keys and scale; targets are constants.

    Args:
        queries: (B, D).
        keys: (B, D); key i belongs to query i.
        scale: (), s.
        targets: Returns rows of T, non-negative.
        keep: Returns rows of bool; False excludes a pair from the denominator. Pairs with a target must be kept.
        chunk: Rows per chunk.

    Returns:
        The loss, ().
    """
    learn = torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, scale))
    loss: Tensor = _ChunkedCrossEntropy.apply(queries, keys, scale, targets, keep, min(chunk, len(queries)), learn)
    return loss

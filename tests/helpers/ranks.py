"""Which rows of a batch a rank holds in tests, unequally; found by test files in pytest as well as in the pool's processes."""

from __future__ import annotations

from ctx_distill import distributed


def own_rows(total: int, first: int) -> slice:
    """Of one rank all; of two the first `first` and the rest; of four 1, first - 1, total - first - 1 and 1 rows."""
    cuts = {1: (0, total), 2: (0, first, total), 4: (0, 1, first, total - 1, total)}[distributed.world_size()]
    return slice(cuts[distributed.rank()], cuts[distributed.rank() + 1])

"""A pass that raises has done nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from fp4pass.passes.rewriter import Rewriter


@contextmanager
def undone_if_it_raises(rewriter: Rewriter) -> Iterator[None]:
    """If the body raises, the graph computes its results as before, and the record says so. What was emitted stays
    behind as dead code. The body erases nothing, unless as its last step."""
    nodes = [(node, node.args, node.kwargs) for node in rewriter.graph.nodes]
    state = {name: copy.copy(held) if isinstance(held, (list, dict)) else held for name, held in vars(rewriter).items()}
    try:
        yield
    except Exception:
        for node, args, kwargs in nodes:
            node.args, node.kwargs = args, kwargs
        vars(rewriter).clear()
        vars(rewriter).update(state)
        raise

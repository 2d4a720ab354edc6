"""What every pass shares: the products still to be handled, emitting nodes, and the record of what was done."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.inputs import GraphInputs
from fp4pass.match.cone import value
from fp4pass.match.convention import ABSENT, DIVIDE, GROUP, codes_by_rows, scales_by_rows
from fp4pass.match.products import Product, find_products
from fp4pass.match.proof import Weight
from fp4pass.match.reasons import Apart, Reason, Refusal
from fp4pass.report import Entry

log = logging.getLogger("fp4pass.passes")
aten = torch.ops.aten

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Rewriter:
    """One graph while the passes go over it.

    A rewrite first emits nodes and only then, as its last step, moves the uses of the old node over. If anything
    fails before that the graph still computes what it did, and the product is refused with the failure as its reason.
    ``check`` is called with the graph after each rule of a pass that has several. ``apart``: by their products, why
    experts have become no whole block.
    """

    def __init__(
        self,
        graph: fx.Graph,
        inputs: GraphInputs,
        lowering: str,
        activations: str = "bf16",
        check: Callable[[fx.Graph], None] = lambda graph: None,
    ) -> None:
        self.graph, self.inputs, self.lowering, self.activations = graph, inputs, lowering, activations
        self.check = check
        self.rewritten: list[Entry] = []
        self.refused: list[Entry] = []
        self.apart: dict[fx.Node, Apart] = {}
        self._eight_bit: list[Product] = []
        self._entry_of: dict[fx.Node, int] = {}
        self._at: fx.Node | None = None
        self._moved: dict[fx.Node, fx.Node] = {}

    @functools.cached_property
    def products(self) -> list[Product]:
        """The proven products that no pass has taken yet. Looked for when first asked for, after un-fusing."""
        found = find_products(self.graph, self.inputs)
        refused = [p for p in found if isinstance(p.weight, Refusal)]
        self._eight_bit = [p for p in refused if p.weight.reason is Reason.EIGHT_BIT]
        self.refused += [self._refusal(p, p.weight) for p in refused if p not in self._eight_bit]
        return [p for p in found if isinstance(p.weight, Weight)]

    def take_eight_bit(self) -> list[Product]:
        """The products with one byte a weight that are not handled yet; who takes them replaces or refuses each."""
        _ = self.products
        taken, self._eight_bit = self._eight_bit, []
        return taken

    def call(self, target: Callable[..., Any], *args: Any, **named: Any) -> fx.Node:
        """Emit a call before the node that is being replaced, with its fake result. Nodes replaced before stand for
        what is in their place now."""
        args = fx.node.map_arg(args, self._current)
        with self.graph.inserting_before(self._at):
            node = self.graph.call_function(target, args, named)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = target(*values, **named)
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if name in self._at.meta:
                node.meta[name] = self._at.meta[name]
        return node

    def _current(self, node: fx.Node) -> fx.Node:
        while node in self._moved:
            node = self._moved[node]
        return node

    def replace(
        self, products: Sequence[Product], at: fx.Node, op: str, build: Callable[[], fx.Node], source: str = ""
    ) -> bool:
        """Put what ``build`` emits in the place of ``at``, and record ``products`` as done. False if it failed.

        source: how the weight is written, where that is no convention of NVFP4.
        """
        try:
            new = self._put(at, build)
        except Exception as error:  # whatever went wrong, the graph is still whole: say so and leave it
            log.exception("rewriting %s failed", at)
            for product in products:
                self.refuse(product, Refusal(Reason.FAILED, f"{type(error).__name__}: {error}"))
            return False
        self._entry_of[new] = len(self.rewritten)
        self.rewritten.append(self._entry(products, op, source))
        log.debug("%s -> %s", at, op)
        self._drop(products)
        return True

    def absorb(self, done: fx.Node, at: fx.Node, epilogue: str, build: Callable[[], fx.Node]) -> bool:
        """Put what ``build`` emits in the place of ``at`` and of ``done``, an earlier rewrite's node that it follows.

        The report says that ``epilogue`` is part of it now. False, and nothing has changed, if it failed.
        """
        try:
            self._put(at, build)
        except Exception:  # what it follows stands as it did
            log.exception("taking %s into %s failed", at, done)
            return False
        place = self._entry_of.get(done)
        if place is not None:
            self.rewritten[place] = replace(self.rewritten[place], epilogue=epilogue)
        return True

    def _put(self, at: fx.Node, build: Callable[[], fx.Node]) -> fx.Node:
        self._at = at
        new = build()
        _check_same(at, new)
        at.replace_all_uses_with(new)
        self._moved[at] = new
        return new

    def refuse(self, product: Product, refusal: Refusal) -> None:
        """Leave a product, with the reason."""
        self.refused.append(self._refusal(product, refusal))
        self._drop([product])

    def operands(self, product: Product) -> tuple[fx.Node, fx.Node, fx.Node | None, str]:
        """(codes, scale, global scale, layout) as the ops take them, emitting what turns them into that."""
        roles, convention = product.weight.roles, product.weight.convention
        rows = [*roles.lead, roles.n]
        stored, emit = convention.arrangement, self.reordered
        codes = codes_by_rows(emit, stored, self._bytes(roles.codes), [*rows, roles.k // 2])
        scale = scales_by_rows(emit, stored, self._bytes(roles.scale), [*rows, roles.k // GROUP])
        factor = roles.global_scale
        if factor is not None:
            factor = self._factor(factor, convention.global_scale, roles.lead)
        return codes, scale, factor, convention.layout

    def _bytes(self, node: fx.Node) -> fx.Node:
        return node if value(node).dtype == torch.uint8 else self.call(aten.view.dtype, node, torch.uint8)

    def reordered(self, op: Callable[..., Any], tensor: fx.Node, *args: Any, **named: Any) -> fx.Node:
        """`call`, where a reshape to the shape that a tensor has already is nothing to do."""
        is_there = op is aten.reshape.default and list(value(tensor).shape) == args[0]
        return tensor if is_there else self.call(op, tensor, *args, **named)

    def _factor(self, factor: fx.Node, mode: str, lead: list[int]) -> fx.Node | None:
        """The global scale in float32, as a multiplier, one value or one an expert."""
        if mode == ABSENT:
            return None
        if value(factor).dtype != torch.float32:
            factor = self.call(torch.ops.prims.convert_element_type.default, factor, torch.float32)
        if mode == DIVIDE:
            factor = self.call(aten.reciprocal.default, factor)
        shape = lead if value(factor).numel() > 1 else []
        return factor if list(value(factor).shape) == shape else self.call(aten.reshape.default, factor, shape)

    def _refusal(self, product: Product, refusal: Refusal) -> Entry:
        entry = self._entry([product], str(product.node.target))
        return replace(entry, lowering="", reason=str(refusal), remedy=refusal.reason.remedy)

    def _entry(self, products: Sequence[Product], op: str, source: str = "") -> Entry:
        first = products[0]
        experts, n, k = first.sizes
        positions = (_torch.input_position(p.codes) for p in products)
        apart = self.apart.get(first.node) if len(products) == 1 else None
        return Entry(
            module="",
            op=op,
            n=n,
            k=k,
            experts=experts or 0,
            source=str(first.weight.convention) if isinstance(first.weight, Weight) else source,
            lowering=self.lowering,
            reason=apart.sentence if apart else "",
            remedy=apart.remedy if apart else "",
            inputs=tuple(p for p in positions if p is not None),
        )

    def _drop(self, done: Sequence[Product]) -> None:
        nodes = {p.node for p in done}
        self.products = [p for p in self.products if p.node not in nodes]


def _check_same(old: fx.Node, new: fx.Node) -> None:
    """The replacement must have the shape and dtype of what it replaces."""
    before, after = value(old), value(new)
    if not alike(before, after):
        raise AssertionError(f"{old} is {before.dtype} {before.shape}, its replacement {after.dtype} {after.shape}")


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fake tensors have the same dtype and rank, and the same sizes where both are known."""
    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    pairs = zip(a.shape, b.shape, strict=True)
    return all(m == n for m, n in pairs if isinstance(m, int) and isinstance(n, int))

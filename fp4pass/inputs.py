"""What is known of a compiled call's inputs: their names, which belong to the model, and the values of small tables.

A decode table's values decide whether a product is NVFP4 at all, so they are read before compiling and go into the
cache key. A pass that meets a table which is not among these refuses it, so no cached graph can rest on other values.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fp4pass import _torch
from fp4pass.match.anchors import OPAQUE_PRODUCTS
from fp4pass.match.cone import may_hold_codes
from fp4pass.match.roles import TABLE_BYTES
from fp4pass.match.structure import table_bytes

_STEP = re.compile(r"\.(?:__dict__\['_(?:modules|parameters|buffers)'\]|_(?:modules|parameters|buffers))\['([^']+)'\]")
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
_PRODUCTS |= {name.split("::")[1] for name in OPAQUE_PRODUCTS}
_LOOK_UPS = {"getitem", "embedding", "index", "index_select", "take", "take_along_dim", "gather"}


class CallInputs:
    """The inputs of one graph that dynamo captured, by position."""

    def __init__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        sources = [_torch.source_of(node) for node in placeholders]
        self.names = [module_path(source) for source in sources]
        self.constant = [
            _torch.is_static_input(example) or source.startswith("G[") or "__closure__" in source
            for example, source in zip(examples, sources, strict=True)
        ]
        found = _table_candidates(gm.graph, placeholders, examples, self.constant)
        candidates = {i: examples[i] for i in found if self.constant[i]}
        self.tables = {i: t.detach().cpu().clone() for i, t in candidates.items() if _torch.is_real(t)}
        self._stamps = self._stamps_of(examples)

    def digest(self) -> str:
        """A hash of every table's position and values."""
        found = hashlib.sha256()
        for i, table in sorted(self.tables.items()):
            found.update(f"{i} {table.dtype} {tuple(table.shape)}".encode())
            found.update(table_bytes(table))
        return found.hexdigest()

    def tables_changed(self, inputs: Sequence[Any]) -> bool:
        """Whether a call's tables have other values than those that were read."""
        stamps = self._stamps_of(inputs)
        if stamps == self._stamps and None not in stamps:
            return False
        if any(not torch.equal(inputs[i].cpu(), table) for i, table in self.tables.items()):
            return True
        self._stamps = stamps
        return False

    def _stamps_of(self, inputs: Sequence[Any]) -> list[tuple[int, int] | None]:
        """For each table what tells another tensor, and every write to the same one; inference tensors have no such."""
        tables = [inputs[i] for i in self.tables]
        return [None if table.is_inference() else (table.data_ptr(), table._version) for table in tables]


class GraphInputs:
    """`fp4pass.match.roles.Inputs` for a graph that was traced from the call."""

    def __init__(self, call: CallInputs) -> None:
        self._call = call

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the tensor belongs to the model (parameter, buffer, constant), not to the call."""
        position = _torch.input_position(node)
        return node.op == "get_attr" or (position is not None and self._call.constant[position])

    def table(self, node: fx.Node) -> torch.Tensor | None:
        """The values of a small constant, where they are known and part of the cache key."""
        if node.op == "get_attr":
            found = getattr(node.graph.owning_module, node.target, None)
            return found.detach().cpu() if isinstance(found, torch.Tensor) and _torch.is_real(found) else None
        position = _torch.input_position(node)
        return None if position is None else self._call.tables.get(position)


def module_path(source: str) -> str:
    """``L['self']._modules['lm_head']._parameters['weight']`` -> ``lm_head.weight``; other sources as they are."""
    # Where a module overrides attribute access dynamo reads its parameters by number: their names are not known.
    source = re.sub(r"^dict\.__getitem__\((.*?)\.__dict__\['_\w+'\], .*$", r"\1", source)
    steps = _STEP.findall(source)
    if steps:
        tail = source[[m.end() for m in _STEP.finditer(source)][-1] :]
        # The module itself: a local has no name of its own, a global has one.
        owner = re.match(r"G\['([^']+)'\]", source)
        return ".".join([*owner.groups(), *steps] if owner else steps) + re.sub(r"[^\w.].*", "", tail)
    plain = re.fullmatch(r"[LG]\['([^']+)'\]", source)
    return plain[1] if plain else source


def _table_candidates(
    graph: fx.Graph, placeholders: Sequence[fx.Node], examples: Sequence[Any], constant: Sequence[bool]
) -> Iterator[int]:
    """Small inputs that meet packed codes on the way to a product: what a decode table would do."""
    example_of = dict(zip(placeholders, examples, strict=True))
    held = zip(placeholders, examples, constant, strict=True)
    codes = {n for n, e, of_the_model in held if _is(e) and may_hold_codes(e, of_the_model)}
    experts = {example_of[n].shape[0] for n in codes if example_of[n].dim() == 3}
    small = {
        n
        for n, e in example_of.items()
        if _is(e) and n not in codes and 1 < e.numel() != 0 and e.numel() * e.element_size() <= TABLE_BYTES
    }
    small = {n for n in small if _may_be_table(example_of[n], [example_of[c] for c in codes])}
    tainted, reach, met = set(codes), {n: {n} for n in small}, set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or _name(node) in _PRODUCTS:
            continue
        inputs = node.all_input_nodes
        reached = set().union(*(reach.get(n, ()) for n in inputs))
        if any(n in tainted for n in inputs):
            tainted |= {node, *_written(node)}
            # As many entries as there are experts: global scales, unless the codes pick among them.
            met |= {n for n in reached if _name(node) in _LOOK_UPS or example_of[n].numel() not in experts}
        elif reached:
            reach[node] = reached
    return (i for i, n in enumerate(placeholders) if n in met)


def _is(example: Any) -> bool:
    return isinstance(example, torch.Tensor) and not any(isinstance(s, torch.SymInt) for s in example.shape)


def _may_be_table(tensor: torch.Tensor, codes: Sequence[torch.Tensor]) -> bool:
    """Not so the block scales of some codes: their values must stay out of the key."""
    is_scale = tensor.dtype == torch.float8_e4m3fn or (
        tensor.element_size() == 1 and any(c.numel() in (tensor.numel() * 8, tensor.numel() * 16) for c in codes)
    )
    return not is_scale


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """What an operation in place writes to: its first argument, and what that is a view of."""
    name = _name(node)
    if name != "setitem" and (name.startswith("__") or not name.endswith("_")):
        return
    target = node.args[0]
    while isinstance(target, fx.Node) and target.op != "placeholder":
        yield target
        target = target.args[0] if target.args else None


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))

"""Every private name of torch that fp4pass uses, in one place, with what differs between versions.

Supported: torch 2.11 to 2.13.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fp4pass.errors import VersionError

OLDEST, BELOW = (2, 11), (2, 14)


def check_version() -> None:
    """Raise VersionError unless this torch is one that fp4pass was built for."""
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if not OLDEST <= found < BELOW:
        raise VersionError(
            "this version of torch is not supported",
            seen=f"torch {torch.__version__}",
            expected=f"torch >= {OLDEST[0]}.{OLDEST[1]} and < {BELOW[0]}.{BELOW[1]}",
            do="install a torch in that range, or a newer fp4pass",
        )


check_version()

from torch._dynamo import config as dynamo_config  # noqa: E402
from torch._dynamo.exc import BackendCompilerFailed  # noqa: E402, F401
from torch._functorch._aot_autograd.descriptors import (  # noqa: E402
    AOTInput,
    PlainAOTInput,
    SubclassGetAttrAOTInput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import make_boxed_func  # noqa: E402
from torch._inductor import config as inductor_config  # noqa: E402
from torch._inductor import list_mode_options as mode_options  # noqa: E402
from torch._inductor.compile_fx import compile_fx  # noqa: E402, F401
from torch._inductor.custom_graph_pass import CustomGraphPass  # noqa: E402, F401
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.runtime.runtime_utils import cache_dir as _cache_dir  # noqa: E402
from torch._logging import trace_structured  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402
from torch._subclasses.fake_tensor import unset_fake_temporarily as real_tensors  # noqa: E402, F401
from torch.fx.experimental.symbolic_shapes import (  # noqa: E402
    GuardOnDataDependentSymNode as DataDependentError,  # noqa: F401
)


def decompositions_keeping_products() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions less those that turn a product of one row into multiply and sum.

    Under coordinate descent tuning (``max-autotune``) these would take the product away before any pass could see it.
    """
    aten = torch.ops.aten
    kept = (aten.mm, aten.mv, aten.bmm, aten.addmm, aten.baddbmm)
    table = select_decomp_table()
    return _Decompositions((op, rule) for op, rule in table.items() if getattr(op, "overloadpacket", None) not in kept)


class _Decompositions(dict):
    """A table that pickles as what made it: torch 2.13 pickles it into its cache key, and the rules cannot be."""

    def __reduce__(self) -> tuple:
        return decompositions_keeping_products, ()


def is_inductor_option(name: str) -> bool:
    """Whether ``name`` is a setting of Inductor's own, as ``options=`` of torch.compile takes them."""
    return name.replace("-", "_") in inductor_config._config


def input_position(node: fx.Node) -> int | None:
    """Which input of the compiled call a placeholder stands for; None for tangents and for constants."""
    described: AOTInput | None = node.meta.get("desc")
    while isinstance(described, SubclassGetAttrAOTInput):
        described = described.base
    return described.idx if isinstance(described, PlainAOTInput) else None


def is_training(graph: fx.Graph) -> bool:
    """Whether the graph is a joint one: forward and backward, with tangents among its inputs."""
    return any(isinstance(n.meta.get("desc"), TangentAOTInput) for n in graph.find_nodes(op="placeholder"))


def source_of(placeholder: fx.Node) -> str:
    """Where dynamo took an input from, as an expression: ``L['self']._modules['lm_head']._parameters['weight']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    return "" if source is None else str(source.name)


def is_static_input(example: Any) -> bool:
    """Whether dynamo took a tensor as part of a module: parameter, buffer or tensor attribute."""
    return isinstance(example, torch.nn.Parameter) or getattr(example, "_dynamo_static_input_type", None) == "unguarded"


def report_directory() -> Path:
    """A folder of ours beside Inductor's compile cache, which lives and dies with it."""
    return Path(_cache_dir()) / "fp4pass"


def user_passes(setting: str) -> Sequence[Any]:
    """The passes that somebody else has put where one of ours goes: the name of Inductor's setting."""
    found = getattr(inductor_config, setting)
    return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [found]


def emit_trace(name: str, payload: Callable[[], str]) -> None:
    """Add an artifact to ``TORCH_TRACE``; ``payload`` is only called where tracing is on."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=payload)


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for one of torch.compile's modes."""
    return dict(mode_options(mode)) if mode and mode != "default" else {}


@functools.cache
def mode_names() -> tuple[str, ...]:
    """The modes that torch.compile knows."""
    return tuple(mode_options())


def reset_cudagraphs() -> None:
    """Forget recorded CUDA graphs, as torch.compiler.reset() asks of a backend."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


def is_real(tensor: torch.Tensor) -> bool:
    """Whether the tensor has values: neither fake nor on the meta device."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


def many_recompiles() -> AbstractContextManager[None]:
    """While tracing is all that is wanted, dynamo's limit of compiles for one function does not apply."""
    return dynamo_config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)


def boxed(gm: fx.GraphModule) -> Callable[..., Any]:
    """The graph as a callable that takes its inputs in one list and clears it, as compiled code does."""
    return make_boxed_func(gm.forward)

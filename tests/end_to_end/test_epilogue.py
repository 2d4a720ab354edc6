"""The shared expert of transformers' own class: its relu2 is inside of the first product, in the generated code too."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import fp4pass

from ..graphs.running import relative_error


@pytest.fixture
def shared(nano_model):
    """up_proj, relu2, down_proj."""
    return nano_model(dtype=torch.bfloat16).model.layers[1].mixer.shared_experts


@torch.no_grad()
def code_of(module, x, **options):
    """The result and Inductor's code."""
    torch.compiler.reset()
    compiled = torch.compile(
        module, backend="fp4pass", options={"force_disable_caches": True, **options}, fullgraph=True
    )
    found, (code,) = run_and_get_code(compiled, x)
    return found, code


def test_no_kernel_is_left_between_the_products_of_a_shared_expert(shared, dense_twin, nano_model, generated):
    x = torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    found, code = code_of(shared, x)
    assert code.count("torch.ops.fp4pass_traced.linear.default(") == 2 and code.count("'relu2'") == 1
    assert "cpp_fused" not in code
    up, down = fp4pass.last_report().rewritten
    assert (up.module, up.epilogue, down.epilogue) == ("up_proj", "relu2", "")
    apart, code = code_of(shared, x, disable=["epilogue"])
    assert "'relu2'" not in code and re.search(r"cpp_fused\w*_relu", code)
    truth = dense_twin(nano_model(dtype=torch.bfloat16), torch.float64).model.layers[1].mixer.shared_experts(x.double())
    assert relative_error(found, truth) < relative_error(apart, truth)

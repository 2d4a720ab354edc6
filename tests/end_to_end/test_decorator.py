"""``fp4pass.compile`` on functions, methods and models; what it refuses, and when."""

import functools
import inspect

import pytest
import torch
from torch import nn

from fp4pass.checkpoint.modules import NVFP4Linear
from fp4pass.decorator import compile as fp4compile
from fp4pass.errors import OptionError, UnmatchedError, WrapError
from fp4pass.nvfp4 import quantize
from fp4pass.report import last_report


def packed_linear(n=32, k=48, seed=0):
    """An NVFP4Linear with random weights."""
    torch.manual_seed(seed)
    made = NVFP4Linear(k, n, device="cpu")
    for part, tensor in zip(("weight", "weight_scale", "weight_scale_2"), quantize(torch.randn(n, k)), strict=True):
        getattr(made, part).data.copy_(tensor)
    return made


LINEAR = packed_linear()


def rewritten():
    """Modules of the products that the latest compile rewrote; none may be left."""
    assert not last_report().refused
    return [entry.module for entry in last_report().rewritten]


def test_a_bare_decorator_rewrites_and_keeps_the_function_as_it_was():
    @fp4compile
    @torch.no_grad()
    def scores(x: torch.Tensor, *, times: float = 2.0) -> torch.Tensor:
        """Scores of x."""
        return LINEAR(x) * times

    assert list(inspect.signature(scores).parameters) == ["x", "times"]
    assert (scores.__name__, scores.__doc__) == ("scores", "Scores of x.")
    x = torch.randn(5, 48)
    torch.testing.assert_close(scores(x, times=3.0), scores.__wrapped__(x, times=3.0), rtol=1e-5, atol=1e-4)
    assert len(rewritten()) == 1


def test_forward_decorated_in_a_class_body_stays_a_method_with_its_signature():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = packed_linear(32, 48, 1), packed_linear(48, 32, 2)

        @fp4compile(fullgraph=True, dynamic=True)
        def forward(self, x: torch.Tensor, scale: float = 1.0, **unused: object) -> torch.Tensor:
            return self.down(self.up(x).relu()) * scale

    model, x = Model(), torch.randn(3, 48)
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale", "unused"]
    expected = model.down.reference_forward(model.up.reference_forward(x).relu())
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-4)
    assert rewritten() == ["up", "down"]


def test_a_forward_that_calls_super_is_compiled_with_what_it_calls():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = packed_linear()

        def forward(self, x):
            return self.only(x)

    class Compiled(Base):
        @fp4compile(fullgraph=True)
        def forward(self, x):
            return super().forward(x)

    model, x = Compiled(), torch.randn(2, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.only.reference_forward(x), rtol=1e-5, atol=1e-4)
    assert rewritten() == ["only"]


def test_a_model_comes_back_compiled_and_shares_its_weights():
    model, x = nn.Sequential(packed_linear(seed=3), nn.ReLU()), torch.randn(2, 48)
    compiled = fp4compile(model)
    assert compiled.get_parameter("0.weight") is model.get_parameter("0.weight")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model[0].reference_forward(x).relu(), rtol=1e-5, atol=1e-4)
    assert rewritten() == ["0"]


def test_options_as_keywords_as_a_mapping_and_beside_a_mode_reach_the_backend():
    decorate = fp4compile(mode="max-autotune-no-cudagraphs", options={"require_match": True}, disable=["linear"])

    @decorate
    @torch.no_grad()
    def product(x):
        return LINEAR(x)

    with pytest.raises(Exception, match="1 quantized products were not rewritten") as caught:
        product(torch.ones(2, 48))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), UnmatchedError)


def generator(x):
    yield x


async def coroutine(x):
    return x


async def async_generator(x):
    yield x


class Model(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (Model, "a class"),
        (staticmethod(len), "a staticmethod"),
        (classmethod(len), "a staticmethod or classmethod"),
        (generator, "a generator"),
        (functools.partial(generator, 1), "a generator"),
        (async_generator, "a generator"),
        (coroutine, "a coroutine"),
        (torch.compile(Model()), "what torch.compile has made"),
        (fp4compile(lambda x: x), "what torch.compile has made"),
        (property(len), "cannot be called"),
        (3, "cannot be called"),
    ],
    ids=lambda given: getattr(given, "__name__", None) or (given if isinstance(given, str) else type(given).__name__),
)
def test_what_cannot_be_wrapped_is_refused_by_name_at_decoration(target, named):
    with pytest.raises(WrapError, match=named) as caught:
        fp4compile(target)
    assert caught.value.do
    with pytest.raises(WrapError, match=named):
        fp4compile(fullgraph=True)(target)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"require_mach": True}, "did you mean 'require_match'"),
        ({"require_match": "yes"}, "True or False"),
        ({"mode": "fastest"}, "max-autotune"),
        ({"options": {"target_sn": 90}}, "did you mean 'target_sm'"),
    ],
)
def test_a_wrong_option_is_refused_before_there_is_anything_to_compile(given, says):
    with pytest.raises(OptionError, match=says):
        fp4compile(**given)

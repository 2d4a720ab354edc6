"""What may be asked of the backend, how it is checked, and what it changes."""

from __future__ import annotations

import pytest
import torch

from fp4pass.errors import OptionError
from fp4pass.match.reasons import Reason
from fp4pass.options import Options
from fp4pass.report import last_report

from .running import activations, called, compiling, relative_error
from .spellings import LINEARS, PRODUCTS_OF_EXPERTS, K, Packed

PLAIN, GATHERED = LINEARS["table_of_16"], PRODUCTS_OF_EXPERTS["gathered_after_decode"]


def test_nothing_asked_is_the_default():
    assert Options.parse() == Options.parse(None, {}) == Options()
    assert Options().patches() == {}


def test_a_mode_may_come_alone_or_among_the_options():
    assert Options.parse("max-autotune") == Options.parse(options={"mode": "max-autotune"})
    assert Options.parse("default").patches() == {}
    assert Options.parse("reduce-overhead").patches() == {"triton.cudagraphs": True}


def test_settings_of_inductor_go_to_inductor_and_win_over_the_mode():
    options = Options.parse(options={"mode": "max-autotune", "max_autotune": False, "epilogue-fusion": True})
    assert options.inductor == (("epilogue_fusion", True), ("max_autotune", False))
    patches = options.patches()
    assert patches["max_autotune"] is False and patches["coordinate_descent_tuning"] and patches["epilogue_fusion"]


def test_the_order_in_which_things_are_asked_does_not_matter():
    one = Options.parse(options={"disable": ["moe", "linear"], "max_autotune": True, "epilogue_fusion": False})
    two = Options.parse(options={"epilogue_fusion": False, "max_autotune": True, "disable": {"linear", "moe"}})
    assert one == two and repr(one) == repr(two) and hash(one) == hash(two)


@pytest.mark.parametrize(
    "asked, nearest",
    [
        ("target", "target_sm"),
        ("require_matches", "require_match"),
        ("disabled", "disable"),
        ("modes", "mode"),
        ("chek", "check"),
    ],
)
def test_an_unknown_option_names_the_nearest(asked, nearest):
    with pytest.raises(OptionError) as caught:
        Options.parse(options={asked: True})
    assert caught.value.seen == repr(asked) and caught.value.do == f"did you mean {nearest!r}?"
    assert len(str(caught.value)) < 400


def test_an_option_unlike_any_other_gets_the_list():
    with pytest.raises(
        OptionError, match="one of activations, check, disable, mode, require_match, target_sm, or a setting"
    ) as caught:
        Options.parse(options={"zzz": 1})
    assert "did you mean" not in caught.value.do


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"mode": "fastest"}, "max-autotune"),
        ({"target_sm": "sm_90"}, "80 or 90"),
        ({"target_sm": 9.0}, "80 or 90"),
        ({"target_sm": True}, "80 or 90"),
        ({"target_sm": 9}, "80 or 90"),
        ({"require_match": "yes"}, "True or False"),
        ({"check": 1}, "True or False"),
        ({"disable": "linear"}, "a list of passes among unfuse, linear, epilogue"),
        ({"disable": ["linears"]}, "a list of passes among unfuse, linear, epilogue"),
        ({"activations": "fp4"}, "bf16, emulate"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_do(options, expected):
    ((name, value),) = options.items()
    with pytest.raises(OptionError, match=f"option '{name}'") as caught:
        Options.parse(options=options)
    assert expected in caught.value.expected
    assert repr(value) in caught.value.seen or repr((value[0],)) == caught.value.seen


def test_a_wrong_option_is_an_error_of_the_compile():
    with pytest.raises(Exception, match="did you mean 'target_sm'"):
        torch.compile(torch.nn.Linear(2, 2), backend="fp4pass", options={"target_sn": 90})(torch.ones(1, 2))


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_products_are_found_in_every_mode(mode, rows):
    """Under coordinate descent tuning Inductor's own decompositions would take a product of one row apart."""
    run = compiling(Packed(PLAIN), {"mode": mode})
    run(activations(rows, K))
    assert [entry.op for entry in run.report.rewritten] == ["fp4pass.linear"]


@pytest.mark.parametrize("asked", [{"mode": "reduce-overhead"}, {"options": {"mode": "max-autotune"}}])
@torch.no_grad()
def test_a_mode_is_taken_as_torch_hands_it_over(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    module, x = Packed(PLAIN), activations(1, K)
    result = torch.compile(module, backend="fp4pass", **asked)(x)
    assert relative_error(result, module.exact_product(x)) < 1e-6
    assert [entry.op for entry in last_report().rewritten] == ["fp4pass.linear"]


@pytest.mark.parametrize("target, reason", [(75, Reason.TOO_OLD), (100, Reason.NATIVE_FP4), (120, Reason.NATIVE_FP4)])
@torch.no_grad()
def test_a_gpu_that_is_not_served_keeps_its_graph(target, reason):
    run = compiling(Packed(PLAIN), {"target_sm": target})
    run(activations(3, K))
    (entry,) = run.report.refused
    assert entry.reason == f"{reason.sentence} (sm_{target})" and run.report.target == f"sm_{target}"
    assert "fp4pass.linear.default" not in called(run.graphs[0])


@pytest.mark.parametrize("target", [80, 86, 89, 90])
@torch.no_grad()
def test_a_gpu_that_is_not_at_hand_can_be_compiled_for(target):
    run = compiling(Packed(PLAIN), {"target_sm": target})
    run(activations(3, K))
    assert run.report.rewritten[0].lowering == f"Triton, sm_{target}" and run.report.target == f"sm_{target}"


@pytest.mark.parametrize(
    "name, spelling", [("linear", PLAIN), ("experts", PRODUCTS_OF_EXPERTS["gathered_after_decode"])]
)
@torch.no_grad()
def test_a_pass_can_be_switched_off(name, spelling):
    inputs = activations(3, K), *([torch.tensor([0, 2, 2])] if spelling.experts else [])
    run = compiling(Packed(spelling), {"disable": [name]})
    run(*inputs)
    (entry,) = run.report.refused
    assert entry.reason.startswith(Reason.DISABLED.sentence) and "disable" in entry.remedy
    other = compiling(Packed(spelling), {"disable": ["moe"]})
    other(*inputs)
    assert len(other.report.rewritten) == 1

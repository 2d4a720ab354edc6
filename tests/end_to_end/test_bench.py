"""The benchmark's parts that need no GPU: what it measures, that its results are checked, what it prints and stores."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

import fp4pass
from fp4pass import nvfp4
from fp4pass.bench import cases, clock, compiled, compiles, dense, host, moe, routed, table
from fp4pass.checkpoint.releases import RELEASES
from fp4pass.checkpoint.tensors import products
from fp4pass.cli import ERROR, FOUND_FAULTS, OK, main
from fp4pass.errors import OptionError

CPU = torch.device("cpu")
LAYER, BLOCK = cases.Dense("layer", 112, 80), cases.Moe("block", 8, 2, 80, 48)
ROWS = (
    table.Row("dense", "a.layer", "32 x 16", 1, 2.0, 4.5, None, 1.0, 1.5, 1e-3, 2e-3, "16x64x128"),
    table.Row("dense", "a.layer", "32 x 16", 4096, 20.0, 10.0, 9.0, 1.0, 1.5, 1e-3, 2e-3, "128x128x64"),
    table.Row("moe", "a.block", "8 x 48 x 80, top 2", 1, 30.0, 90.0, None, 10.0, None, 2e-3, 3e-3, "16x64x128"),
)
RUN = table.Run({"": "a GPU", "torch": "2.11.0"}, ROWS)


@pytest.fixture
def stored(tmp_path):
    """``stored(rows)``: the path of a run's JSON."""

    def write(rows=ROWS):
        (tmp_path / "run.json").write_text(replace(RUN, rows=tuple(rows)).to_json())
        return tmp_path / "run.json"

    return write


def test_the_cases_are_layers_of_the_releases():
    sizes = {like: release.sizes for like, release in RELEASES.items()}
    real = {f"{like}.{each.kind}": (each.n, each.k) for like in sizes for each in products(sizes[like])}
    assert {case.name: (case.n, case.k) for case in cases.DENSE if case.name != "square"}.items() <= real.items()
    for case in cases.MOE:
        full = sizes[case.name.partition(".")[0]]
        assert (case.experts, case.top_k, case.inner) == (full.experts, full.top_k, full.intermediate)
        assert case.width == (full.latent or full.hidden)


def test_cases_are_chosen_by_kind_and_name():
    assert cases.choose(cases.KINDS, None) == [*cases.DENSE, *cases.MOE]
    assert cases.choose(["moe"], ["nano.experts"]) == [cases.MOE[0]]
    with pytest.raises(OptionError, match=r"did you mean 'nano.in_proj'"):
        cases.choose(["dense"], ["nano.inproj"])


def test_calls_at_once_are_all_made_and_an_error_is_not_lost():
    together, made = threading.Barrier(3, timeout=60), []

    def call(number):
        together.wait()
        made.append(number)

    compiled.at_once([partial(call, number) for number in range(3)])
    assert sorted(made) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        compiled.at_once([partial(made.append, 3), lambda: 1 / 0])


def test_bytes_are_those_of_the_packed_tensors():
    codes, scale, _ = nvfp4.quantize(torch.randn(LAYER.n, LAYER.k))
    assert LAYER.weight_bytes() == codes.nbytes + scale.nbytes


@pytest.mark.parametrize(
    ("cost", "microseconds"),
    [
        (cases.DENSE[0].cost(1), 3.63),
        (cases.DENSE[0].cost(4096), 287.21),
        (cases.MOE[0].cost(1, active=6), 7.8),
        (cases.MOE[0].cost(8192, active=128), 1241.6),
    ],
)
def test_the_roofline_is_that_of_earlier_measurements(cost, microseconds):
    assert clock.roofline(*cost) == pytest.approx(microseconds, rel=0.01)


def test_samples_and_copies_cover_what_they_should():
    assert list(range(10))[clock.sample(10, 4)] == [0, 3, 6, 9]
    assert list(range(10))[clock.sample(10, 10)] == list(range(10))
    assert [clock.copies(size, in_turn=100) for size in (30, 50, 100, 1000)] == [4, 2, 1, 1]


def test_linear_layers_are_compiled_timed_and_held_against_float64():
    rows = list(dense.measure(LAYER, (1, 3), CPU, triton_tokens=(), bytes_in_turn=3 * LAYER.weight_bytes()))
    assert [(row.kind, row.name, row.tokens, row.triton, row.floor) for row in rows] == [
        ("dense", "layer", 1, None, None),
        ("dense", "layer", 3, None, None),
    ]
    assert all(0 < row.error <= row.bf16_error < 0.01 and row.fp4pass > 0 and row.bf16 > 0 for row in rows)


def test_decoding_then_multiplying_is_timed_where_there_are_many_tokens(monkeypatch):
    monkeypatch.setattr(dense, "DECODED_FROM", 2)
    rows = list(dense.measure(LAYER, (1, 3), CPU, bytes_in_turn=1, plain_backend="eager"))
    assert rows[0].decoded is None and rows[1].decoded > 0
    assert "123.4" in str(replace(rows[1], decoded=123.4))


def test_experts_are_compiled_timed_and_held_against_float64():
    rows = list(moe.measure(BLOCK, (1, 9), CPU, bytes_in_turn=1, plain_backend="eager"))
    assert [(row.kind, row.name, row.tokens) for row in rows] == [("moe", "block", 1), ("moe", "block", 9)]
    assert all(0 < row.error <= row.bf16_error < 0.02 and row.fp4pass > 0 and row.bf16 > 0 for row in rows)


@pytest.mark.parametrize("spoil", [lambda y: y.index_fill_(1, torch.tensor(111), torch.nan), lambda y: y.mul_(1.01)])
def test_a_wrong_result_has_no_ratio(spoil, monkeypatch):
    monkeypatch.setattr(dense, "compile_ours", lambda: lambda module, x: spoil(module(x)))
    monkeypatch.setattr(dense, "_MOST_WEIGHT_ROWS", 2)  # the last column is not among those
    (row,) = dense.measure(LAYER, (3,), CPU, bytes_in_turn=1)
    assert not row.right and row.ratio is None
    assert "wrong" in str(row) and "wrong" in replace(RUN, rows=(row,)).markdown()


def test_calls_in_turn_go_to_other_experts_while_there_are_others():
    case = cases.Moe("block", 8, 2, 16, 16)
    in_turn = 4 * 2 * case.expert_bytes()
    chosen = torch.cat([ids.flatten() for ids, _ in routed.routings(case, 1, CPU, in_turn)])
    assert sorted(chosen.tolist()) == list(range(8))
    ids, weights = routed.routings(case, 5, CPU, in_turn)[0]
    assert all(len(set(row)) == 2 for row in ids.tolist())
    assert torch.allclose(weights.sum(-1), torch.ones(5))


def test_a_stored_run_comes_back(stored):
    assert table.load(stored()) == RUN


def test_a_stored_run_is_printed_with_its_machine_and_ratios(stored, capsys):
    assert main(["bench", "--from", str(stored())]) == OK
    printed = capsys.readouterr().out
    assert printed.startswith("a GPU, torch 2.11.0\n")
    assert "| tokens | 1 | 4096 |\n| --- | --- | --- |\n| `a.layer` 32 x 16 | 2.25 | 0.50 |\n" in printed
    assert "| `a.block` 8 x 48 x 80, top 2 | 3.00 |\n" in printed


def test_a_wrong_row_has_no_ratio_and_a_bad_exit_code(stored, capsys):
    assert main(["bench", "--from", str(stored([replace(ROWS[0], error=float("nan"))]))]) == FOUND_FAULTS
    printed = capsys.readouterr().out
    assert printed.count("wrong") == 2 and "2.25" not in printed


@pytest.mark.parametrize("content", ["{", "[]", '{"machine": {}, "rows": [{"kind": "dense"}]}'])
def test_a_file_with_something_else_is_refused(content, tmp_path, capsys):
    (tmp_path / "other.json").write_text(content)
    assert main(["bench", "--from", str(tmp_path / "other.json")]) == ERROR
    assert "holds no run of the benchmark" in capsys.readouterr().err


def test_a_stored_run_is_plotted(stored, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["bench", "--from", str(stored()), "--plot", str(tmp_path / "run.png")]) == OK
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured(stored, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--from", str(stored()), "--plot", str(tmp_path / "run.png")]) == ERROR
    printed = capsys.readouterr()
    assert "a plot needs matplotlib" in printed.err and not printed.out


@torch.no_grad()
def test_a_layer_compiles_twice_for_all_sizes_also_from_a_warm_cache(nano_model, generated):
    layer = nano_model(dtype=torch.bfloat16).model.layers[1].mixer.shared_experts
    for _ in range(2):
        torch.compiler.reset()
        compiled = compiles.Counted(layer)
        for count in (1, 7, 300, 3000, 16, 128, 2):
            x = torch.randn(count, 80, dtype=torch.bfloat16)
            assert clock.relative_error(compiled(x), layer(x).double()) < 2**-7
        assert compiled.compiles == 2


@pytest.mark.parametrize(
    ("given", "over"),
    [
        (["host", "--tokens", "1", "--json", "run.json"], "--tokens, --json"),
        (["compile", "--plot", "run.png"], "--plot"),
        (["compile", "--from", "run.json"], "--from"),
        (["dense", "--layers", "3"], "--layers"),
        (["moe", "--from", "run.json"], "--from"),
        (["--from", "run.json", "--shapes", "square"], "--shapes"),
    ],
)
def test_arguments_that_would_be_passed_over_are_refused(given, over, capsys):
    assert main(["bench", *given]) == ERROR
    assert "has no use for some of its arguments" in (printed := capsys.readouterr().err)
    assert f" {over}\n  expected:" in printed


def test_calls_of_each_op_are_timed_on_the_host_as_compiled_code_and_as_others_make_them(monkeypatch):
    shapes = []

    def timed(call, device, calls):
        shapes.append(tuple(call().shape))
        return float(len(shapes))

    monkeypatch.setattr(host, "_microseconds", timed)
    rows = list(host.measure(CPU))
    asked = [(op, tokens) for op, numbers in host.TOKENS.items() for tokens in numbers]
    assert [(row.op, row.tokens) for row in rows] == asked
    assert rows[0] == host.Row("linear", 1, 1.0, 2.0, 3.0) and rows[-1].bf16 is None
    assert host.table(rows[:1]).splitlines()[2:] == ["| `linear` | 1 | 1.0 | 2.0 | 3.0 |"]
    # Ours twice and PyTorch's give results of one shape.
    assert shapes[:3] == [(1, host.LAYER.n)] * 3 and shapes[-2:] == [(asked[-1][1], host.BLOCK.width)] * 2


def test_calls_are_timed_one_by_one():
    made = []
    assert host._microseconds(lambda: made.append(0), CPU, 4) > 0
    assert len(made) % 4 == 0 and made


def test_compile_times_are_those_of_two_processes_with_the_same_caches(monkeypatch, capsys):
    seconds, caches = iter((9.5, 2.5)), []

    def finished(command, env, **_):
        caches.append((env["TORCHINDUCTOR_CACHE_DIR"], env["TRITON_CACHE_DIR"]))
        assert json.loads(command[-1]) == [3, 7]
        call = {"tokens": 7, "seconds": next(seconds), "compiles": 1}
        return subprocess.CompletedProcess(command, 0, f"something else\n{json.dumps([call])}\n")

    monkeypatch.setattr(subprocess, "run", finished)
    assert main(["bench", "compile", "--layers", "3", "--tokens", "7"]) == OK
    assert capsys.readouterr().out.splitlines()[-2].split() == ["7", "9.5", "1", "2.5", "1"]
    assert len(caches) == 2 and len(set(caches)) == 1


def test_a_model_compiles_three_times_for_a_step_and_prompts_of_any_length(graphs):
    # One of them for transformers' mixer, which treats up to 128 tokens apart, and multiples of that again.
    calls = list(compiles.first_calls(2, (1, 7, 300, 3000, 2, 16, 17, 257), CPU))
    assert [call.compiles for call in calls] == [1, 2, 3, 3, 3, 3, 3, 3]
    report = fp4pass.last_report()
    assert {entry.op for entry in report.rewritten} == {"fp4pass.linear", "fp4pass.experts"} and not report.refused


@pytest.mark.fuzz
@torch.no_grad()
def test_a_model_compiles_as_often_as_it_is_traced(graphs):
    """Our regimes add no guard: what is told apart, transformers tells apart (up to 128 tokens, multiples of 128)."""
    sizes = (1, 7, 128, 300, 256, 3000, 512, 129)
    ours = [call.compiles for call in compiles.first_calls(2, sizes, CPU)]
    torch.compiler.reset()
    traced, found = [], []
    model = compiles.random_model(2, CPU, compiles._NARROW | compiles._NARROW_MAMBA)
    plain = torch.compile(model, backend=lambda gm, _: traced.append(gm) or gm, fullgraph=True)
    for count in sizes:
        plain(torch.zeros(1, count, dtype=torch.long), use_cache=False, logits_to_keep=1)
        found.append(len(traced))
    assert ours == found and found[-1] == 5

"""Launches beside each other: what is asked for is understood, what is wrong is not timed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import astuple

import pytest
import torch

pytest.importorskip("triton")

from fp4pass.bench import routed, trials, tune
from fp4pass.bench.cases import DENSE, MOE, Moe
from fp4pass.errors import OptionError
from fp4pass.lowering import reference
from fp4pass.lowering.arch import ARCHS
from fp4pass.lowering.launches import FewRows, InParts, ManyRows, MmaRows
from fp4pass.lowering.layout import FRAGMENTS

CPU = torch.device("cpu")
RIGHT, WRONG = FewRows(4, 8, 8, slots=4), ManyRows(16, 6, room=2)
BLOCK = Moe("block", 16, 3, 256, 192)


@pytest.fixture
def twin(monkeypatch):
    """The plain-torch twin in the kernels' place. With WRONG one number in a thousand is lost."""

    def run(only, x, weight):
        out = reference.linear(x, *weight, None, FRAGMENTS)
        if only == WRONG:
            out.view(-1)[::1000] = 0
        return out

    def run_block(only, x, routing, up, down):
        out = reference.experts(x, *routing, *up, *down, "relu2", FRAGMENTS)
        return out * 1.01 if only == WRONG else out

    monkeypatch.setattr(tune, "run_with", run)
    monkeypatch.setattr(tune, "run_block_with", run_block)


def test_launches_are_written_as_in_the_tables():
    assert trials.parse_launch("FewRows(8, 8, 16, slots=4, early=True)") == FewRows(8, 8, 16, slots=4, early=True)
    for launch in (WRONG, MmaRows(64), InParts(128, WRONG, FewRows(8, 8, 8, slots=4))):
        assert trials.parse_launch(repr(launch)) == launch


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ManyRows",
        "ManyRows(16)",
        "ManyRows(16, 6, rom=2)",
        "Tile(8, 8)",
        "dict(a=1)",
        "FewRows(open('x'), 8, 8)",
        "InParts(128, ManyRows(16, 6), Tile(8, 8))",
        "a.b()",
    ],
)
def test_what_is_no_launch_is_refused(text):
    with pytest.raises(OptionError, match="this is no launch"):
        trials.parse_launch(text)


def test_shapes_are_named_or_given():
    assert trials.parse_shape("nano.out_proj") in DENSE and trials.parse_shape("nano.experts") in MOE
    assert (trials.parse_shape("256x2688").n, trials.parse_shape("256x2688").k) == (256, 2688)
    for text in ("nano.out", "256", "250x2688", "256x2688x2"):
        with pytest.raises(OptionError, match="no shape of a weight"):
            trials.parse_shape(text)


def test_a_trial_is_a_shape_its_tokens_and_launches():
    eight, sixteen = trials.parse_trials(f"nano.out_proj 8 16 | {RIGHT!r} | {WRONG!r}")
    assert (eight.tokens, sixteen.tokens) == (8, 16)
    assert eight.case == sixteen.case == trials.parse_shape("nano.out_proj")
    assert eight.tried == sixteen.tried == (RIGHT, WRONG)
    for text in ("", "nano.out_proj", f"nano.out_proj | {RIGHT!r}", "nano.out_proj 8, 16"):
        with pytest.raises(OptionError, match="nothing to try"):
            trials.parse_trials(text)


def test_trials_are_read_from_a_file_too(tmp_path, capsys, monkeypatch):
    (tmp_path / "trials").write_text(f"256x192 4 | {RIGHT!r}\n\n64x192 4 8\n", encoding="utf-8")
    monkeypatch.setattr(tune, "gpu", lambda: CPU)
    monkeypatch.setattr(tune, "compare", lambda trials, device, sm: [f"{t.case.name} {t.tokens}" for t in trials])
    assert tune.main([f"@{tmp_path / 'trials'}", "64x256 2"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == ["256x192 4", "64x192 4", "64x192 8", "64x256 2"]


def test_a_launch_is_held_against_float64(twin):
    case = trials.parse_shape("256x192")
    assert tune.faults(RIGHT, case, 8, CPU) == ""
    assert tune.faults(WRONG, case, 8, CPU).startswith("wrong: error ")


@pytest.mark.parametrize("tokens", (1, 40))
def test_a_launch_of_experts_is_held_against_float64(twin, tokens):
    assert tune.faults(RIGHT, BLOCK, tokens, CPU) == ""
    assert tune.faults(WRONG, BLOCK, tokens, CPU).startswith("wrong: error ")


def test_of_a_launch_in_parts_only_those_run_that_have_rows():
    parts = InParts(128, WRONG, RIGHT)
    only = tune._Only(*astuple(ARCHS[90]), parts)
    assert [only.launch(rows, torch.bfloat16) for rows in (126, 128, 129)] == [WRONG, WRONG, parts]


def test_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(tune, "run_with", lambda only, x, weight: torch.full((len(x), 256), torch.nan))
    case = trials.parse_shape("256x192")
    assert tune.faults(RIGHT, case, 8, CPU) == "wrong: error nan for 8 rows and a weight of 256"


def test_what_raises_is_said_in_a_line():
    assert tune._try((RIGHT, trials.parse_shape("64x192"), 8, CPU)) == "DeviceError: the kernels need a CUDA device"


def test_only_what_is_right_is_timed(twin, monkeypatch):
    monkeypatch.setattr(tune, "copies", lambda size: 1)
    monkeypatch.setattr(tune, "target", lambda device: ARCHS[90])
    monkeypatch.setattr(tune, "checked", lambda tasks, sm: map(tune._try, tasks))
    asked = trials.parse_trials(f"256x192 4 | {RIGHT!r} | {WRONG!r}")
    heading, ours, right, wrong = tune.compare(asked, CPU)
    assert heading.startswith("256x192 256 x 192, 4 tokens: BF16 ")
    taken = ARCHS[90].launch(4, torch.bfloat16, FRAGMENTS, columns=256, depth=192)
    for line, each in ((ours, taken), (right, RIGHT)):
        time, ratio, rest = line.split(maxsplit=2)
        assert float(time) > 0 and float(ratio) >= 0 and rest == repr(each)
    assert wrong.startswith("  wrong: error ") and wrong.endswith(repr(WRONG))


def test_launches_of_experts_stand_beside_that_of_the_tables(twin, monkeypatch):
    monkeypatch.setattr(routed, "copies", lambda size, in_turn: 2)
    monkeypatch.setattr(tune, "target", lambda device: ARCHS[90])
    monkeypatch.setattr(tune, "checked", lambda tasks, sm: map(tune._try, tasks))
    heading, ours, right, wrong = tune.compare([trials.Trial(BLOCK, 40, (RIGHT, WRONG))], CPU)
    assert heading.startswith("block 16 x 192 x 256, top 3, 40 tokens: roofline ")
    taken = ARCHS[90].launch(8, torch.bfloat16, FRAGMENTS, columns=192, depth=256, experts=True)
    assert float(ours.split()[1]) == 1 and ours.endswith(repr(taken)) and right.endswith(repr(RIGHT))
    assert wrong.startswith("  wrong: error ") and wrong.endswith(repr(WRONG))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_launches_of_experts_run_and_are_right():
    small, banded = ManyRows(64, 3, 2), ManyRows(256, 5, deep=1, band=64)
    assert [tune.faults(each, BLOCK, 1500, torch.device("cuda")) for each in (small, banded)] == ["", ""]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main(["64x192 4"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_of_an_older_gpu_run_on_this_one():
    launch = MmaRows(64, high=1)
    command = [sys.executable, "-m", "fp4pass.bench.tune", "--as-sm", "80", f"1024x256 8 | {launch!r}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    *_, heading, ours, other = said
    assert heading.startswith("1024x256 1024 x 256, 8 tokens: BF16 ")
    taken = ARCHS[80].launch(8, torch.bfloat16, FRAGMENTS, columns=1024, depth=256)
    for line, each in ((ours, taken), (other, launch)):
        assert float(line.split()[0]) > 0 and line.endswith(repr(each))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_what_does_not_fit_is_named(capsys):
    too_large = FewRows(16, 4, 64, slots=4)
    assert tune.main([f"256x2688 64 | {too_large!r}"]) == 0
    *_, ours, other = capsys.readouterr().out.splitlines()
    assert float(ours.split()[0]) > 0
    assert "OutOfResources" in other and other.endswith(repr(too_large))

"""The command line: what it prints, where, and with which exit code."""

import json
import subprocess
import sys

import pytest
import torch

from fp4pass import doctor
from fp4pass.checkpoint import releases
from fp4pass.checkpoint.config import config_json_form
from fp4pass.checkpoint.tensors import quantization
from fp4pass.cli import ERROR, FOUND_FAULTS, OK, main
from fp4pass.report import Report


@pytest.fixture
def tiny_flags(tiny_sizes):
    """The tiny dimensions as options of ``synthesize``."""
    return [text for name, value in tiny_sizes.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def test_synthesize_writes_what_explain_then_reads(tmp_path, tiny_flags, capsys):
    assert main(["synthesize", str(tmp_path / "made"), "--like", "nano", "--seed", "1", *tiny_flags]) == OK
    assert "like NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4" in capsys.readouterr().out
    assert main(["explain", str(tmp_path / "made")]) == OK
    printed = capsys.readouterr().out
    assert printed.startswith("fp4pass: 8 of 8 quantized products rewritten (cpu)")
    assert "model.layers.{1,3}.mixer.experts" in printed


def test_explain_prints_json_for_a_gpu_that_is_not_here(nano_dir, capsys):
    assert main(["explain", str(nano_dir), "--target-sm", "80", "--json"]) == OK
    report = Report.from_json(capsys.readouterr().out)
    assert (report.target, len(report.rewritten), report.refused) == ("sm_80", 8, ())


@pytest.mark.fuzz
@pytest.mark.parametrize(("like", "products"), [("nano", 103), ("ultra", 240)])
def test_explain_reads_a_release_at_full_size_from_its_config_files(like, products, tmp_path, capsys):
    """Minutes of tracing on two cores: one to two seconds a layer, nearly all of it PyTorch's own."""
    made = releases.RELEASES[like]
    facts = quantization(like, made, made.sizes)
    config = releases.config(made, made.sizes)
    if made.quantization_in_config:
        config["quantization_config"] = config_json_form(facts)
    for name, content in {"config.json": config, "hf_quant_config.json": facts}.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert main(["explain", str(tmp_path), "--target-sm", "90", "--json"]) == OK
    assert len(Report.from_json(capsys.readouterr().out).rewritten) == products


def test_explain_exits_with_one_where_products_are_left(nano_dir, capsys):
    assert main(["explain", str(nano_dir), "--target-sm", "100"]) == FOUND_FAULTS
    assert "natively" in capsys.readouterr().out


def test_generate_gives_the_same_text_compiled_and_eager_with_the_report_apart(nano_dir, capsys):
    command = ["generate", str(nano_dir), "--prompt", "hello", "--max-new-tokens", "6", "--dtype", "float32"]
    assert main([*command, "--device", "cpu", "--eager"]) == OK
    eager = capsys.readouterr()
    assert main([*command, "--device", "cpu"]) == OK
    compiled = capsys.readouterr()
    assert compiled.out == eager.out
    assert eager.out.startswith("hello")
    assert "8 of 8 quantized products rewritten" in compiled.err
    assert "rewritten" not in eager.err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["explain", "no-such-folder"], "there is no such checkpoint"),
        (["explain", "DIR", "--target-sm", "9"], "option 'target_sm' has a value"),
        (["generate", "DIR", "--prompt", "x", "--device", "cuda:99"], "does not have the device"),
        pytest.param(["bench"], "the benchmark needs a GPU", marks=pytest.mark.skipif("torch.cuda.is_available()")),
        pytest.param(["bench", "host"], "needs a GPU", marks=pytest.mark.skipif("torch.cuda.is_available()")),
        (["synthesize", "DIR", "--hidden", "80"], "holds a checkpoint already"),
        (["synthesize", "NEW", "--layers", "999"], "number of layers out of range"),
    ],
)
def test_an_error_is_a_few_lines_on_stderr_and_exit_code_two(command, says, nano_dir, tmp_path, capsys):
    paths = {"DIR": str(nano_dir), "NEW": str(tmp_path / "new")}
    assert main([paths.get(word, word) for word in command]) == ERROR
    printed = capsys.readouterr()
    assert printed.err.startswith("fp4pass: ")
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.splitlines()) <= 5
    assert not printed.out
    assert not (tmp_path / "new").exists()


def test_a_broken_config_is_named(nano_dir, tmp_path, capsys):
    config = json.loads((nano_dir / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf_quant_config.json").write_text("{")
    assert main(["explain", str(tmp_path)]) == ERROR
    assert "hf_quant_config.json is not JSON" in capsys.readouterr().err


def test_the_module_can_be_run_and_doctor_finds_all_well():
    done = subprocess.run([sys.executable, "-m", "fp4pass", "doctor"], capture_output=True, text=True, timeout=120)
    assert done.returncode == OK, done.stdout + done.stderr
    assert "all 4,064 code x scale products exact in bfloat16, float16, float32" in done.stdout
    assert torch.__version__ in done.stdout
    assert "All is well." in done.stdout


def test_doctor_finds_wrong_arithmetic(monkeypatch, capsys):
    exact = torch.ops.fp4pass.linear

    class Broken:
        """An op whose products are a quarter too large from code 9 on."""

        def __call__(self, x, codes, *rest):
            return exact(x, codes, *rest) * torch.where(torch.arange(64) % 16 > 8, 1.25, 1.0)[:, None].to(x.dtype)

    monkeypatch.setattr(torch.ops.fp4pass, "linear", Broken())
    assert doctor.self_test(torch.device("cpu"), torch.float32) == 7 * 252
    assert main(["doctor"]) == FOUND_FAULTS
    assert "self-test cpu: results on this device cannot be trusted" in capsys.readouterr().out


@pytest.mark.parametrize(("sm", "says"), [(70, "below SM80"), (80, "fused"), (90, "fused"), (100, "native FP4")])
def test_doctor_says_what_is_done_on_a_gpu(sm, says):
    assert says in doctor.describe_gpu("a GPU", sm)

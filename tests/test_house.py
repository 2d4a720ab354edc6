"""What holds for the sources as a whole, and for the README."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fp4pass import cli
from fp4pass.lowering.arch import support_matrix

ROOT = Path(__file__).parent.parent
PACKAGES = [path for folder in ("fp4pass", "lowering") for path in sorted((ROOT / folder).rglob("*.py"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Private by name, but torch's own documentation of custom backends uses them, and they have no public spelling.
NO_PUBLIC_NAME = {"torch._ops.OpOverload", "torch.utils._pytree"}


def relative(path):
    return str(path.relative_to(ROOT))


def private_torch_names(source):
    """Dotted names of torch that have a part with a leading underscore, imported or reached by attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
        for name in names:
            if re.fullmatch(r"torch(\.\w+)*\._[a-z]\w*(\.\w+)*", name) and not name.startswith("torch.ops."):
                yield name


def writes_environment(source):
    """Statements that write an environment variable."""
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node)
        stored = isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and "os.environ" in text
        called = isinstance(node, ast.Call) and re.match(r"os\.(putenv|environ\.(setdefault|update|pop)\()", text)
        if stored or called:
            yield text


def test_private_names_of_torch_are_used_in_one_file():
    found = {
        (relative(path), name)
        for path in PACKAGES
        if path.name != "_torch.py"
        for name in private_torch_names(path.read_text())
        if not any(known.startswith(name) or name.startswith(known) for known in NO_PUBLIC_NAME)
    }
    assert found == set()


def test_the_search_for_private_names_sees_what_it_should():
    assert list(private_torch_names("import torch._inductor.config")) == ["torch._inductor.config"]
    assert list(private_torch_names("from torch._dynamo import reset")) == ["torch._dynamo.reset"]
    assert "torch._foreach_add" in set(private_torch_names("torch._foreach_add(a, b)"))
    assert not list(private_torch_names("torch.ops.aten._grouped_mm.default; torch.__version__"))


def test_no_environment_variable_is_written():
    assert {relative(path): list(writes_environment(path.read_text())) for path in PACKAGES} == {
        relative(path): [] for path in PACKAGES
    }
    assert list(writes_environment("os.environ['A'] = '1'")) == ["os.environ['A']"]
    assert list(writes_environment("os.environ.setdefault('A', '1')"))


@pytest.mark.parametrize("path", [*PACKAGES, *EXAMPLES], ids=relative)
def test_files_and_functions_stay_small(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            assert node.end_lineno - node.lineno < (120 if is_kernel else 60), node.name


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_every_example_has_a_main_and_runs_it(path):
    tree = ast.parse(path.read_text())
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':")
    assert ast.get_docstring(tree)


def test_the_small_example_shows_one_rewrite_and_one_refusal():
    done = subprocess.run(
        [sys.executable, ROOT / "examples/explain.py"], capture_output=True, text=True, timeout=200, check=True
    )
    assert "1 of 2 quantized products rewritten (sm_80)" in done.stdout


def test_a_bare_import_of_lowering_names_the_right_one():
    done = subprocess.run([sys.executable, "-c", "import lowering"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: import fp4pass.lowering: ")


def test_a_wheel_installs_one_top_level_name_with_every_module(tmp_path):
    for folder in ("fp4pass", "lowering"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True, timeout=200)
    names = set(zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fp4pass"}
    modules = {re.sub("^lowering/", "fp4pass/lowering/", relative(path)) for path in PACKAGES}
    assert modules <= names


def test_the_readme_prints_the_support_matrix_that_holds():
    assert f"compares -->\n{support_matrix()}\n<!-- end -->" in README


def test_the_readme_names_every_option_and_command():
    from dataclasses import fields

    from fp4pass.options import Options
    from fp4pass.pipeline import PASSES

    rows = {row[1] for row in re.finditer(r"^\| `(\w+)` \|", README, re.MULTILINE)}
    assert rows == {field.name for field in fields(Options)} - {"inductor"}
    assert ", ".join(f"`{each.name}`" for each in PASSES) in README


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthesize = re.search(r"^python -m fp4pass (synthesize .*)$", README, re.MULTILINE)
    assert cli.main(synthesize[1].split()) == cli.OK
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    # In a file, since the compiler reads the source of what it traces.
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "quantized products rewritten (sm_80)" in done.stdout

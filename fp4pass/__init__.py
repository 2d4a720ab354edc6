"""NVFP4 checkpoints on GPUs without FP4: a torch.compile backend that proves, rewrites and reports.

Importing this registers the ModelOpt quantizer with transformers, so that ``from_pretrained`` loads such checkpoints.
"""

from importlib.util import find_spec as _find_spec

from fp4pass.errors import VersionError

if _find_spec("fp4pass.lowering") is None:
    raise VersionError(
        "this checkout of fp4pass is not installed",
        seen="a folder fp4pass without fp4pass.lowering, which the installation maps from the folder lowering",
        expected="an installed package",
        do="run `pip install -e .` in the checkout once, or start Python elsewhere if fp4pass is installed",
    )

from fp4pass import nvfp4
from fp4pass.checkpoint.load import from_pretrained
from fp4pass.checkpoint.quantizer import register as _register
from fp4pass.decorator import compile
from fp4pass.explain import explain
from fp4pass.options import Options
from fp4pass.report import Report, last_report

__version__ = "0.1.0"

__all__ = ["Options", "Report", "compile", "explain", "from_pretrained", "last_report", "nvfp4"]

_register()

"""NVFP4 checkpoints on GPUs without FP4: a torch.compile backend that proves, rewrites and reports."""

from fp4pass.report import Report, last_report

__version__ = "0.1.0"

__all__ = ["Report", "last_report"]

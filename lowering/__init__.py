"""Ops, layouts and kernels for NVFP4 weights. Knows nothing of graphs or models. Imported as ``fp4pass.lowering``."""

if __name__ == "lowering":
    raise ImportError("import fp4pass.lowering: this folder is installed under that name, not as a top-level module")

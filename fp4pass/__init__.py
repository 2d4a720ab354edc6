"""NVFP4 checkpoints on GPUs without FP4: a torch.compile backend that proves, rewrites and reports."""

"""Checkpoints on disk, and the modules that hold their weights: everything that knows of ModelOpt or transformers."""

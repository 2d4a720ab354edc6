"""Load an NVFP4 checkpoint with transformers, compile it with fp4pass, write text. Runs on a laptop.

Give the folder of a checkpoint, or nothing: then a small one with random weights is written first.

    python examples/quickstart.py [DIR]
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, PreTrainedModel
from transformers.utils import logging

import fp4pass
from fp4pass.synthesize import synthesize

# Two Mamba layers, two of experts, one of attention. Every width is a multiple of 16 and none is one of 64: nothing
# here fits a tile by luck.
SIZES = {
    "layers": 5,
    "hidden": 336,
    "experts": 16,
    "top_k": 4,
    "intermediate": 208,
    "shared": 368,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "mamba_heads": 16,
    "mamba_head_dim": 21,
    "groups": 2,
    "state": 32,
    "vocab": 512,
}


def quiet() -> None:
    """Keep progress bars, and what transformers and dynamo remark on their own code, out of the output."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write a small checkpoint in the layout of Nemotron 3 Nano, its quantization in config.json."""
    return synthesize(folder, "nano", seed=seed, quantization_in_config=True, **SIZES)


def load(folder: Path) -> PreTrainedModel:
    """The model in ``folder``, its weights packed, on the GPU if there is one. fp4pass need only be imported."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def write_text(model: PreTrainedModel, folder: Path, prompt: str, tokens: int = 24) -> str:
    """The prompt and what the model makes of it, decoded by a graph that fp4pass has compiled."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = CompileConfig(backend="fp4pass")
    # On accelerators generate() compiles by itself; on the CPU it has to be asked to.
    config._compile_all_devices = True
    found = model.generate(
        **tokenizer(prompt, return_tensors="pt").to(model.device),
        max_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
    )
    return tokenizer.decode(found[0], skip_special_tokens=True)


def main() -> None:
    """Write a checkpoint unless one is given, load it, generate."""
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else make_checkpoint(Path(temporary) / "nano-like")
        print(repr(write_text(load(folder), folder, "Four bits are")))
        print(fp4pass.last_report())


if __name__ == "__main__":
    main()

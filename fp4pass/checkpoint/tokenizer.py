"""A small byte-level tokenizer for synthetic checkpoints: every byte is a token, ids above are made-up words.

The words are never produced by encoding; they are there so that whatever id a random model picks decodes to something
readable.
"""

from __future__ import annotations

from itertools import product
from typing import Any

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
"""Ids 0, 1, 2, as the releases' configs name them (pad, bos, eos)."""

_SYLLABLES = ["".join(pair) for pair in product("bdfghjklmnprstvwz", "aeiou")]
_SPACE = "\u0120"  # how byte-level BPE spells a blank


def tokenizer_files(vocab: int, max_positions: int) -> dict[str, Any]:
    """``{file name: JSON content}`` of a tokenizer with ``vocab`` entries (at least 259) that AutoTokenizer loads."""
    symbols = [*SPECIAL_TOKENS, *_byte_symbols()]
    words = (_SPACE + "".join(parts) for length in (2, 3, 4) for parts in product(_SYLLABLES, repeat=length))
    symbols += [next(words) for _ in range(vocab - len(symbols))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **added} for i, token in enumerate(SPECIAL_TOKENS)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {symbol: i for i, symbol in enumerate(symbols)}, "merges": []},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL_TOKENS[0],
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _byte_symbols() -> list[str]:
    """Byte-level BPE's printable stand-in for each byte: itself where printable, else the next free code above 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(0x100)]

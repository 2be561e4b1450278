"""The playground's tokenizer: an ordinary `CLIPTokenizer` with a small vocabulary of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from .scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES

LENGTH = 24  # tokens, begin and end included; the longest caption of the world has 20


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: all bytes, so that any text tokenises, and one token per word of the world."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = ["a", "and", "background", "on", "the", "at", *SHAPES, *COLOURS, *BACKGROUNDS, *SIZES]
    words += [word for place in PLACES.values() for word in place.split()]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        parts = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:  # what earlier words' merges make of it
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == merge:
                    parts[i : i + 2] = ["".join(merge)]
                i += 1
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            tokens.append(parts[0])
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    return {token: number for number, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path) -> Any:
    """Write vocab.json, merges.txt and the tokenizer's configs to `folder`; returns the `CLIPTokenizer`."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()
    pairs: Any = merges  # as tuples, which `tokenizers` wants and the annotation there does not say
    tokenizer = CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return tokenizer


def tokens(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token numbers (n, 24) of captions, padded and cut as the pipeline does it."""
    how: Any = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **how).input_ids


def cut(ids: Tensor, tokenizer: Any) -> Tensor:
    """Token numbers without the padding that no row needs; the towers are causal, so it changes nothing."""
    return ids[:, : int((ids != tokenizer.eos_token_id).sum(1).max()) + 1]

"""What a misspelt word was probably meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: str, legal: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the nearest legal word, or nothing when none is near."""
    close = difflib.get_close_matches(word, list(legal), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

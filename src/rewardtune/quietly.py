"""The libraries' loading bars, switched off for what loads at once; a download keeps its own."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Without the bars of diffusers and transformers; afterwards they are as they were."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    shown = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()

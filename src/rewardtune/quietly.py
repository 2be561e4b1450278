"""The libraries' loading bars and remarks, switched off where they say nothing; a download keeps its bar."""

import logging
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


@contextmanager
def no_text_encoder_remarks() -> Iterator[None]:
    """Without diffusers' remark on each text encoder that a LoRA leaves alone; what it says of lost keys stays."""

    def keeps(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")

    logger = logging.getLogger("diffusers.loaders.lora_base")
    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)


@contextmanager
def no_retry_lines() -> Iterator[None]:
    """Without the hub client's line for each of its tries: what is wrong is said once, by our own error."""
    import huggingface_hub.utils.logging as hub_log

    level = hub_log.get_verbosity()
    hub_log.set_verbosity_error()
    try:
        yield
    finally:
        hub_log.set_verbosity(level)

"""What can go wrong, by exit code. Every message says what was given, what is legal and what to do."""


class RewardTuneError(Exception):
    """Base of all errors that rewardtune raises on purpose; the command prints them in one line."""

    exit_code = 1


class ConfigError(RewardTuneError, ValueError):
    """A setting, file or argument is wrong (exit code 2)."""

    exit_code = 2


class PreflightError(RewardTuneError):
    """The pipeline, or a part of it, cannot be opened exactly (exit code 3)."""

    exit_code = 3


class RewardError(PreflightError):
    """A reward returned the wrong shape, a NaN, or no gradient (exit code 3)."""


class ReplayError(PreflightError):
    """A replayed network call did not reproduce what was recorded (exit code 3)."""


class TrainingStopped(RewardTuneError):  # noqa: N818 - it is an outcome, not a mistake
    """A guard, a NaN or too little memory stopped the run (exit code 4)."""

    exit_code = 4


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that caused it, says that the device's or the main memory is full."""
    while error is not None:
        if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error):
            return True
        error = error.__cause__
    return False

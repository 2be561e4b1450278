"""What can go wrong, by exit code. Every message says what was given, what is legal and what to do."""

from importlib.util import find_spec


class RewardTuneError(Exception):
    """Base of all errors that rewardtune raises on purpose; the command prints them in one line."""

    exit_code = 1


class ConfigError(RewardTuneError, ValueError):
    """A setting, file or argument is wrong (exit code 2)."""

    exit_code = 2


class CannotWrite(RewardTuneError):  # noqa: N818 - it says what happened
    """The system refuses to write a file: a full disk, no permission, a file where a folder should be."""


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


class BrokenPictures(TrainingStopped):
    """The weights as they are give NaN or black pictures."""


def first_line(error: BaseException) -> str:
    """What a foreign error says, for the middle of a sentence: its first line, else its class; no stop at the end."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip().rstrip(".")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that caused it, says that the device's or the main memory is full."""
    while error is not None:
        if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error):
            return True
        error = error.__cause__
    return False


#: Optional packages of diffusers and transformers, by the module that they bring.
OPTIONAL = {
    "ftfy": "ftfy",
    "bs4": "beautifulsoup4",
    "sentencepiece": "sentencepiece",
    "google.protobuf": "protobuf",
    "tiktoken": "tiktoken",
}


def missing_package(error: BaseException) -> str | None:
    """The package to install, where this error comes of an optional one that is not there.

    Some pipelines of diffusers import such a module only where it is installed, and use its name all the same.
    """
    if isinstance(error, NameError):
        named = [error.name]
    elif isinstance(error, ImportError):
        words = f"{error.name} {error}".lower()
        named = [module for module, package in OPTIONAL.items() if module in words or package in words]
    else:
        return None
    return next((OPTIONAL[module] for module in named if module in OPTIONAL and not _installed(module)), None)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False

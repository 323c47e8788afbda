"""Every error that a user can meet. An error is one line: what was asked, what was found, what would work.

EdgekdError                     exit 1   it failed
├── DataError                   exit 1   samples, labels or shapes that do not fit
├── ModelFileError              exit 1   a truncated, foreign or unsafe model file
├── CacheError                  exit 1   a teacher cache that is damaged, or of another teacher
├── NumericalError              exit 1   NaN or infinity in outputs or loss
├── ExportError                 exit 1   a converter refused the program
│   └── ParityError             exit 1   the file computes something else than the program
├── BudgetError                 exit 1   no mixed precision loses as little as was asked
├── DeviceError                 exit 1   a device that is not there, or broke off
├── StorageError                exit 1   the disk is full or the folder cannot be written
├── UsageError                  exit 2   a wrong name, option or path
│   ├── RecipeError             exit 2   the faults of an edgekd.toml, all at once
│   └── MissingToolchainError   exit 2   an extra that is not installed; the message holds the install line
└── InconclusiveError           exit 3   measured, but nothing can be concluded
"""

from collections.abc import Sequence

__all__ = [
    "BudgetError",
    "CacheError",
    "DataError",
    "DeviceError",
    "EdgekdError",
    "ExportError",
    "InconclusiveError",
    "MissingToolchainError",
    "ModelFileError",
    "NumericalError",
    "ParityError",
    "RecipeError",
    "StorageError",
    "UsageError",
    "first_line",
]


def first_line(error: BaseException) -> str:
    """What someone else's error says, in one line; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class EdgekdError(Exception):
    """Base of all errors that are told to the user as one line."""

    exit_code = 1


class DataError(EdgekdError):
    """Samples, labels or shapes do not fit what was asked."""


class ModelFileError(EdgekdError):
    """A model file is truncated, of another format, or would run code when loaded."""


class CacheError(EdgekdError):
    """A teacher cache is damaged, incomplete, or belongs to another teacher or data set."""


class NumericalError(EdgekdError):
    """NaN or infinity where a number was needed."""


class ExportError(EdgekdError):
    """A converter could not translate the program."""


class ParityError(ExportError):
    """An exported file does not compute what its program computes."""


class BudgetError(EdgekdError):
    """No mix of precisions keeps what was asked."""


class DeviceError(EdgekdError):
    """A device cannot be reached, or stopped answering."""


class StorageError(EdgekdError):
    """Nothing could be written: the disk is full, or the folder is not ours."""


class UsageError(EdgekdError):
    """The call names something that does not exist or cannot be combined."""

    exit_code = 2


class RecipeError(UsageError):
    """An edgekd.toml has faults.

    Attributes:
        faults: One line each: ``key.path: what is wrong; what would work``.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class MissingToolchainError(UsageError):
    """A Python package of an extra is not installed."""

    def __init__(self, what: str, module: str, extra: str) -> None:
        super().__init__(f"{what} needs {module}, which is not installed; pip install 'edgekd[{extra}]'")


class InconclusiveError(EdgekdError):
    """The measurement is valid, but does not decide the question."""

    exit_code = 3

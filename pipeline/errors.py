"""The error tree: a RunError stops the run with an exit code, a RowError is recorded on its row and the run goes on.

Every class takes one positional message, so that each error survives pickling between Ray processes. Credentials are
taken out of it when the error is made, so that no log, table or run.json that repeats it can hold them.
"""

from pipeline.redaction import redact_text

__all__ = [
    "CheckpointError",
    "CheckpointNotWrittenError",
    "ConfigError",
    "CorruptImageError",
    "FailureBudgetExceeded",
    "ImageTooLargeError",
    "MaskmillError",
    "MissingPredictionError",
    "MissingTargetError",
    "PredictError",
    "PredictTimeoutError",
    "RowError",
    "RunError",
    "SchemaError",
    "SourceChangedError",
    "StorageError",
    "TargetMismatchError",
    "TrainingDivergedError",
    "UnknownModelError",
    "UnreadableError",
]

EXIT_OK = 0
EXIT_UNEXPECTED = 1
EXIT_CONFIG = 2
EXIT_BUDGET = 3
EXIT_STORAGE = 4
EXIT_INTERRUPTED = 130


class MaskmillError(Exception):
    """Root of all errors that this package raises on purpose."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redact_text(item) if isinstance(item, str) else item for item in arguments))


class RunError(MaskmillError):
    """Stops the run; what is committed stays committed."""

    exit_code = EXIT_UNEXPECTED


class ConfigError(RunError):
    """The run cannot start as configured."""

    exit_code = EXIT_CONFIG


class UnknownModelError(ConfigError):
    """A model name that is not in the registry."""


class CheckpointError(ConfigError):
    """Weights that cannot be found, are not safe to read, or do not fit the model."""


class SchemaError(ConfigError):
    """A table or file whose columns are not the ones expected."""


class StorageError(RunError):
    """Storage that refuses, is missing or keeps failing."""

    exit_code = EXIT_STORAGE


class CheckpointNotWrittenError(StorageError):
    """The end of a training run that storage does not take; what was learned since the checkpoint before is lost."""


class SourceChangedError(RunError):
    """A unit whose content is no longer what the committed rows were made from."""

    exit_code = EXIT_STORAGE


class TrainingDivergedError(RunError):
    """A loss or gradient that is not finite; the weights before it are in the last checkpoint."""


class FailureBudgetExceeded(RunError):  # noqa: N818  (the name of the contract)
    """More rows failed than `failure_budget` allows."""

    exit_code = EXIT_BUDGET


class RowError(MaskmillError):
    """Recorded on one row (`error_type`, `error_stage`, `error_message`); the run goes on."""


class UnreadableError(RowError):
    """Bytes that could not be read: a missing object, a refused object, a cut archive."""


class CorruptImageError(RowError):
    """Bytes that are no image, or not a whole one."""


class ImageTooLargeError(RowError):
    """An image over `max_pixels`, an object over the size limit, or one that no memory budget fits."""


class TargetMismatchError(RowError):
    """A target whose size or ids do not fit its image or taxonomy."""


class PredictError(RowError):
    """The model raised on this image, or gave values that are no prediction."""


class MissingTargetError(RowError):
    """A prediction of an image that the source does not have, or of which it has no target to hold it against."""


class MissingPredictionError(RowError):
    """A target of which there is no prediction."""


class PredictTimeoutError(RowError):
    """The model did not answer for this image in time."""

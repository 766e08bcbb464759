"""The error tree: what stops a run and with which exit code, what is recorded on a row, and that all of it pickles."""

import copy
import pickle

import pytest

from pipeline import errors
from pipeline.errors import MaskmillError, RowError, RunError

EXIT_CODES = {
    "RunError": 1,
    "ConfigError": 2,
    "TrainingDivergedError": 1,
    "UnknownModelError": 2,
    "CheckpointError": 2,
    "CheckpointNotWrittenError": 4,
    "SchemaError": 2,
    "FailureBudgetExceeded": 3,
    "StorageError": 4,
    "SourceChangedError": 4,
}
ROW_ERRORS = {
    "RowError",
    "CorruptImageError",
    "ImageTooLargeError",
    "MissingPredictionError",
    "MissingTargetError",
    "PredictError",
    "PredictTimeoutError",
    "TargetMismatchError",
    "UnreadableError",
}


def test_public_names() -> None:
    assert sorted(errors.__all__) == sorted({"MaskmillError", *EXIT_CODES, *ROW_ERRORS})


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_pickles_and_keeps_its_message(name: str) -> None:
    error = getattr(errors, name)("num_classes must be 2 or more, got 1 (model.num_classes) ü")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.args == error.args


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items())
def test_run_errors_have_exit_codes(name: str, code: int) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, RunError)
    assert not issubclass(kind, RowError)
    assert kind("x").exit_code == code


@pytest.mark.parametrize("name", sorted(ROW_ERRORS))
def test_row_errors_stop_nothing(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, RowError)
    assert not issubclass(kind, RunError)
    assert not hasattr(kind, "exit_code")


def test_one_root() -> None:
    assert all(issubclass(getattr(errors, name), MaskmillError) for name in errors.__all__)
    assert not issubclass(MaskmillError, OSError | ValueError)


def test_exit_codes_are_distinct() -> None:
    codes = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert sorted(codes) == [0, 1, 2, 3, 4, 130]

"""Errors have cause and mend as fields, and are one line as text."""

from __future__ import annotations

import inspect
import pickle

import pytest

import tetrarch
from tetrarch import errors
from tetrarch.console import ConsoleError
from tetrarch.errors import TetrarchError

# A ValueProblem is no error yet: it becomes a ConfigError, which knows the option.
RAISED = [name for name in errors.__all__ if issubclass(getattr(errors, name), TetrarchError)]
CLASSES = [getattr(errors, name) for name in RAISED] + [
    ConsoleError,
    tetrarch.ExpectTimeout,
]


@pytest.mark.parametrize("kind", CLASSES)
def test_cause_and_mend_are_fields_and_one_line(kind: type[TetrarchError]) -> None:
    error = kind("no file a\nb", mend="name another")
    assert (error.cause, error.mend) == ("no file a\nb", "name another")
    assert str(error) == "no file a b; name another"


@pytest.mark.parametrize("kind", CLASSES)
def test_no_mend_leaves_the_cause_alone(kind: type[TetrarchError]) -> None:
    assert str(kind("it is gone")) == "it is gone"


@pytest.mark.parametrize("kind", CLASSES)
def test_error_of_another_process_arrives_whole(kind: type[TetrarchError]) -> None:
    error = pickle.loads(pickle.dumps(kind("a; b", mend="c")))
    assert (type(error), error.cause, error.mend, str(error)) == (kind, "a; b", "c", "a; b; c")


def test_every_error_class_is_a_public_name_of_the_package() -> None:
    assert set(RAISED) <= set(tetrarch.__all__)
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined == set(errors.__all__)

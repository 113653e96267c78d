"""Exceptions travel between processes: each can be pickled and copied."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import pillarbox
from pillarbox.errors import ConfigurationError, InvalidEventError
from pillarbox.sinks.base import Rejection

ARGUMENTS: dict[str, object] = {"rejection": Rejection("code", "reason"), "shows_value": False, "value": {"a": 1}}


def exception_classes() -> list[type[BaseException]]:
    """Every class of exceptions that a module of the package defines."""
    classes = set()
    for module in walk_modules():
        for _, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, BaseException) and value.__module__.startswith("pillarbox"):
                classes.add(value)
    return sorted(classes, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")


def walk_modules() -> Iterator[Any]:
    for info in pkgutil.walk_packages(pillarbox.__path__, "pillarbox."):
        if info.name.endswith("__main__"):
            continue
        yield importlib.import_module(info.name)


def make_error(kind: type[BaseException]) -> BaseException:
    """An exception of a class, with an argument for each parameter of its constructor."""
    if not inspect.isfunction(kind.__init__):
        return kind("a message")
    signature = inspect.signature(kind.__init__)
    values = {name: ARGUMENTS.get(name, f"the {name}") for name in list(signature.parameters)[1:]}
    parameters = {name: signature.parameters[name] for name in values}
    positional = [values[name] for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    named = {name: values[name] for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    return kind(*positional, **named)


@pytest.mark.parametrize("kind", exception_classes(), ids=lambda kind: kind.__qualname__)
def test_every_exception_survives_pickling_and_copying(kind: type[BaseException]) -> None:
    """With its message, its attributes and its notes, by every protocol."""
    error = make_error(kind)
    error.add_note("a note")
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]  # noqa: S301 - our own
    for again in (*copies, copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


class TooFewSeatsError(InvalidEventError):
    """As an application may derive one."""

    def __init__(self, *, seats: int) -> None:
        super().__init__("seats", f"only {seats}")
        self.seats = seats


def test_an_exception_that_an_application_derives_survives_too() -> None:
    """Without anything in it for that."""
    again = pickle.loads(pickle.dumps(TooFewSeatsError(seats=3)))  # noqa: S301 - our own
    assert (type(again), str(again), again.seats, again.field) == (TooFewSeatsError, "seats: only 3", 3, "seats")


def make_invalid_event(number: int) -> str:
    return pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id=number).event_id  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_an_exception_in_a_pool_reaches_the_caller(method: str) -> None:
    """One that cannot be unpickled makes `map` wait for ever."""
    with multiprocessing.get_context(method).Pool(1) as pool:
        result = pool.map_async(make_invalid_event, [1])
        with pytest.raises(InvalidEventError, match="scope_id: has the type int, not str") as caught:
            result.get(60)
    assert caught.value.field == "scope_id"


def test_a_configuration_error_keeps_what_it_says() -> None:
    """The advice and the source, for a program that shows them itself."""
    again = pickle.loads(pickle.dumps(ConfigurationError("batch_size", "x", "the call", "use a number")))  # noqa: S301 - our own
    assert (again.setting, again.source, again.advice) == ("batch_size", "the call", "use a number")
    assert str(again) == "batch_size = 'x' (from the call): use a number"

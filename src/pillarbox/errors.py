"""The errors that Pillarbox raises on purpose.

The base class says whose fault an error is. `UsageError`: the call or the setting is wrong; change it. `OperationalError`: the
disk, the directory or the destination does not work; fix that. Any other exception that escapes is a bug in Pillarbox.
`enqueue` raises none of these unless a setting asks for it: it returns `Dropped(reason)`.
"""

from typing import Any, Final

from pillarbox.redaction import redact_text

_VALUE_CHARS_MAX: Final = 1000  # characters of a setting's value that a message shows


class PicklableError(Exception):
    """An exception that can be pickled and copied whatever its constructor takes.

    Otherwise a process pool would wait forever for a worker that raised it.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_error, (type(self), self.args, self.__dict__)


def _restore_error(kind: type[PicklableError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> PicklableError:
    """Restore an exception without calling its constructor, which takes other arguments."""
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(attributes)
    return error


class PillarboxError(PicklableError):
    """Base class of all errors that Pillarbox raises on purpose."""


class UsageError(PillarboxError, ValueError):
    """The call or a setting is wrong; nothing was done."""


class OperationalError(PillarboxError):
    """The disk, the directory or the destination cannot be used as it is."""


class ConfigurationError(UsageError):
    """A setting is wrong. The message says which one, where it came from and what to use instead.

    Args:
        setting: Name of the setting.
        value: Its value, which the message shows. None: the message shows none, because there is none or it may be secret.
        source: Where the value came from: "the call", "the command line", "environment PILLARBOX_...", a file.
        advice: What is wrong or what to use instead, as a clause: "use a number from 1 to 64".

    Attributes:
        setting: Name of the setting.
        source: Where the value came from.
        advice: What is wrong or what to use instead.
    """

    def __init__(self, setting: str, value: object, source: str, advice: str) -> None:
        if value is not None:
            message = f"{setting} = {_shown_value(value)} (from {source}): {advice}"
        else:
            message = advice if source == "the call" else f"{source}: {advice}"
        super().__init__(message)
        self.setting = setting
        self.source = source
        self.advice = advice


def _shown_value(value: object) -> str:
    """The `repr` of a value, shortened, and without secrets of URLs in it."""
    text = repr(redact_text(value)) if type(value) is str else redact_text(repr(value))
    return text if len(text) <= _VALUE_CHARS_MAX else f"{text[:_VALUE_CHARS_MAX]}..."


class InvalidEventError(UsageError):
    """The event cannot be stored.

    Attributes:
        field: The field that is wrong, or "event" for the event as a whole.
        problem: What is wrong with it.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class OutboxFullError(OperationalError):
    """There is no room for the event, and it was not stored. Raised only with `when_full="raise"`.

    Attributes:
        path: The outbox directory.
        reason: Which limit was reached; the same word as in `Dropped.reason`.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: the outbox is full ({reason}); the event was not stored")
        self.path = path
        self.reason = reason


class DirectoryUnusableError(OperationalError):
    """The outbox directory cannot be used.

    Attributes:
        path: The directory.
        remedy: What would make it usable.
    """

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")
        self.path = path
        self.remedy = remedy


class SinkUnusableError(OperationalError):
    """A sink cannot work with its present settings or environment. The message says what to change."""


class FileUnusableError(OperationalError):
    """A file with a name of the store is a link, a device or another user's. It is skipped and never changed.

    Attributes:
        path: The file.
        problem: What it is.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem

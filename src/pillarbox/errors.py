"""Every way in which Pillarbox says no, on one screen.

An error's base class says whose fault it is: `UsageError` is the caller's (mend the call or the setting), `OperationalError` is
the machine's or the destination's (mend the disk, the directory, the server). Anything else that escapes is a defect of ours.
`enqueue` raises none of these unless it was asked to: it answers `Dropped(reason)`.
"""


class PillarboxError(Exception):
    """Base of all errors that Pillarbox raises on purpose."""


class UsageError(PillarboxError, ValueError):
    """The call or the setting is wrong; nothing was done."""


class OperationalError(PillarboxError):
    """The disk or the destination is not as it must be."""


class ConfigurationError(UsageError):
    """A setting has a value that is not allowed; `setting`, `source` and `allowed` say which, from where, and what is."""

    def __init__(self, setting: str, value: object, source: str, allowed: str) -> None:
        super().__init__(f"{setting} = {value!r} (from {source}): must be {allowed}")
        self.setting = setting
        self.source = source
        self.allowed = allowed


class InvalidEventError(UsageError):
    """The event cannot be stored; `field` names the member at fault, `problem` says why."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class OutboxFullError(OperationalError):
    """With `when_full="raise"`: there is no room for the event, which is nowhere; `reason` is that of `Dropped`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: the event was not stored: {reason}")
        self.path = path
        self.reason = reason


class DirectoryUnusableError(OperationalError):
    """The outbox directory cannot be used; `remedy` says what would put it right."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")
        self.path = path
        self.remedy = remedy


class SinkUnusableError(OperationalError):
    """The destination cannot take events as it is set up; the message names the way out."""


class FileUnusableError(OperationalError):
    """A file under one of our names is not ours to use (a link, a device, another owner); it is left alone."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem

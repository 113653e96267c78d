"""`Outbox.enqueue` is a method: a subclass can override it, a test can patch it, and each instance has the faster form."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from unittest.mock import create_autospec, patch

import msgspec
import pytest

from pillarbox import Dropped, Enqueued, Outbox, Outcome
from pillarbox.outcome import Durability
from tests.conftest import event


class CountingOutbox(Outbox):
    """Overrides `enqueue` and calls the method that it overrides."""

    calls = 0

    def enqueue(self, event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
        type(self).calls += 1
        return super().enqueue(event, durability=durability)


class Named(ABC):
    """An abstract class of an application."""

    @abstractmethod
    def title(self) -> str:
        """A title."""


class NamedOutbox(Outbox, Named):
    """An outbox that is also something else."""

    def title(self) -> str:
        return self.name


def test_the_method_has_a_signature_and_a_docstring() -> None:
    """On the class, for editors and for the documentation."""
    assert list(inspect.signature(Outbox.enqueue).parameters) == ["self", "event", "durability"]
    assert "Returns:" in (Outbox.enqueue.__doc__ or "")


def test_an_instance_skips_the_method(tmp_path: Path) -> None:
    """To save a call. Called on the class, the method does the same."""
    with Outbox(str(tmp_path)) as outbox:
        assert outbox.enqueue is outbox._enqueue
        assert outbox.enqueue(event(1)) == Outbox.enqueue(outbox, event(2)) == Enqueued()
        assert Outbox.enqueue(outbox, event(3), durability="power") == Enqueued("power")


def test_an_override_in_a_subclass_wins(tmp_path: Path) -> None:
    """`super().enqueue` stores the event."""
    with CountingOutbox(str(tmp_path)) as outbox:
        assert outbox.enqueue(event(1)) == Enqueued()
        assert outbox.enqueue(event(2), durability="power") == Enqueued("power")
        assert (CountingOutbox.calls, outbox.stats().accepted) == (2, 2)


def test_a_subclass_may_inherit_from_an_abstract_class(tmp_path: Path) -> None:
    """The metaclass does not conflict, and the instance keeps the faster form."""
    with NamedOutbox(str(tmp_path)) as outbox:
        assert outbox.title() == str(tmp_path)
        assert outbox.enqueue is outbox._enqueue


def test_a_patch_of_the_class_wins_for_all_its_outboxes_and_ends(tmp_path: Path) -> None:
    """Of those made before the patch, during it, and of a subclass; afterwards they store again."""
    with Outbox(str(tmp_path / "before")) as before, NamedOutbox(str(tmp_path / "sub")) as sub:
        with patch.object(Outbox, "enqueue", autospec=True, return_value=Dropped("closed")) as fake:
            with Outbox(str(tmp_path / "during")) as during:
                for outbox in (before, sub, during):
                    assert outbox.enqueue(event(1)) == Dropped("closed")
                    fake.assert_called_with(outbox, event(1))
            with pytest.raises(TypeError, match="unexpected"):
                before.enqueue(event(1), colour="red")  # type: ignore[call-arg]
        for outbox in (before, sub):
            assert outbox.enqueue(event(1)) == Enqueued()
            assert outbox.enqueue is outbox._enqueue


def test_a_patch_of_a_subclass_leaves_other_outboxes_alone(tmp_path: Path) -> None:
    """The subclass has no `enqueue` of its own before or after the patch."""
    with Outbox(str(tmp_path / "a")) as outbox, NamedOutbox(str(tmp_path / "b")) as named:
        with patch.object(NamedOutbox, "enqueue", return_value=Dropped("closed")):
            assert named.enqueue(event(1)) == Dropped("closed")
            assert outbox.enqueue(event(1)) == Enqueued()
        assert "enqueue" not in vars(NamedOutbox)
        assert named.enqueue(event(1)) == Enqueued()


def test_an_instance_can_be_patched(tmp_path: Path) -> None:
    """Only that one."""
    with Outbox(str(tmp_path)) as outbox:
        with patch.object(outbox, "enqueue", return_value=Dropped("closed")):
            assert outbox.enqueue(event(1)) == Dropped("closed")
        assert outbox.enqueue(event(1)) == Enqueued()


def test_an_autospec_has_the_signature() -> None:
    """So a test of an application detects a wrong call."""
    fake = create_autospec(Outbox, instance=True)
    fake.enqueue.return_value = Enqueued()
    assert fake.enqueue(event(1), durability="power") == Enqueued()
    with pytest.raises(TypeError):
        fake.enqueue()
    with pytest.raises(TypeError):
        fake.enqueue(event(1), durable=True)

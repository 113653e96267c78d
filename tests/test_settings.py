"""Settings: where they come from, which values are valid, and what an error says."""

from __future__ import annotations

import copy
import inspect
import operator
from pathlib import Path

import msgspec
import pytest

from pillarbox import ConfigurationError, Outbox, Settings, TrackingEvent, resolve
from pillarbox.testing import RecordingSink


def test_defaults() -> None:
    """Without any setting."""
    settings = resolve({})
    assert (settings.batch_size, settings.batch_bytes, settings.flush_interval) == (500, 1_000_000, 1.0)
    assert (settings.max_bytes, settings.enabled, settings.event_type) == (512 * 2**20, True, TrackingEvent)


@pytest.mark.parametrize(
    ("old", "new", "text", "value"),
    [
        ("enabled", "enabled", "false", False),
        ("dir", "directory", "/var/outbox/", "/var/outbox"),
        ("batch_size", "batch_size", "7", 7),
        ("batch_size", "batch_size", "0", 1),
        ("batch_size", "batch_size", "-5", 1),
        ("flush_interval", "flush_interval", "0.25", 0.25),
        ("max_bytes", "max_bytes", "1000", 1000),
    ],
)
def test_settings_of_the_older_system_keep_their_names(tmp_path: Path, old: str, new: str, text: str, value: object) -> None:
    """As keyword, in the environment and in TOML."""
    alias = f"tracking_outbox_{old}"
    config = tmp_path / "pillarbox.toml"
    for name in (new, alias):
        config.write_text(f'[outbox]\n{name} = "{text}"\n')
        assert getattr(resolve({name: text}), new) == value
        assert getattr(resolve({}, config=str(config)), new) == value
    for variable in (f"PILLARBOX_{new}", alias):
        assert getattr(resolve({}, {variable.upper(): text}), new) == value


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_in_flight", "64", 64),
        ("backoff_max", "0.5", 0.5),
        ("retry_after_max", "2d", 172_800.0),
        ("call_timeout", "86400", 86_400.0),
        ("stop_after_rejected_batches", "0", 0),
        ("max_age", "604800", 604_800.0),
        ("compress_after", "60", 60.0),
        ("max_dead_bytes", "1Mi", 2**20),
        ("max_quarantine_bytes", "0", 0),
        ("on_quarantine_full", "discard", "discard"),
        ("before_send", "copy:copy", copy.copy),
        ("on_drop", "operator:mul", operator.mul),
        ("on_dead_letter", "builtins:print", print),
    ],
)
def test_delivery_settings_and_hooks_can_be_set_everywhere(tmp_path: Path, name: str, text: str, value: object) -> None:
    """As keyword, in the environment and in TOML. A hook is a function or its import path."""
    config = tmp_path / "pillarbox.toml"
    config.write_text(f'[outbox]\n{name} = "{text}"\n')
    resolved = [resolve({name: text}), resolve({}, {f"PILLARBOX_{name.upper()}": text}), resolve({}, config=str(config))]
    assert [getattr(settings, name) for settings in resolved] == [value] * 3
    outbox = Outbox(str(tmp_path / "outbox"), **{name: value})  # type: ignore[arg-type]
    assert getattr(outbox.settings, name) == value
    outbox.close()


def test_an_outbox_has_every_setting_as_a_keyword_with_the_same_default(tmp_path: Path) -> None:
    """No setting is passed only through `**keywords`."""
    keywords = inspect.signature(Outbox).parameters
    for field in msgspec.structs.fields(Settings):
        assert field.name in keywords
        if field.name == "sinks":
            assert (keywords["sinks"].default, field.default_factory) == (None, dict)  # a default must not be a shared dict
        elif field.name != "directory":
            assert keywords[field.name].default == field.default
    outbox = Outbox(str(tmp_path))
    assert outbox.settings == resolve({"directory": str(tmp_path)})
    outbox.close()


def test_keywords_win_over_the_environment_and_that_over_toml(tmp_path: Path) -> None:
    """A keyword that is None counts as not set."""
    config = tmp_path / "pillarbox.toml"
    config.write_text("[outbox]\nbatch_size = 1\nmax_bytes = 11\nflush_interval = 3\n")
    environ = {"PILLARBOX_BATCH_SIZE": "2", "PILLARBOX_MAX_BYTES": "22"}
    settings = resolve({"batch_size": 3, "max_bytes": None}, environ, str(config))
    assert (settings.batch_size, settings.max_bytes, settings.flush_interval) == (3, 22, 3.0)


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("64k", 64_000), ("2Mi", 2 * 2**20), ("1GiB", 2**30), ("3 GB".replace(" ", ""), 3 * 10**9)]
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    """Powers of ten; with an i, powers of two."""
    assert resolve({"max_bytes": text}).max_bytes == size


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enabled", "maybe"),
        ("directory", ""),
        ("directory", "a\0b"),
        ("directory", 5),
        ("batch_size", "many"),
        ("batch_size", 1.5),
        ("batch_size", True),
        ("batch_bytes", 0),
        ("flush_interval", 0),
        ("flush_interval", -1),
        ("flush_interval", "nan"),
        ("flush_interval", "inf"),
        ("flush_interval", "soon"),
        ("max_bytes", -1),
        ("max_bytes", "12q"),
        ("max_bytes", "1ki2"),
        ("when_full", "explode"),
        ("durability", "eternal"),
        ("on_invalid", "shrug"),
        ("event_type", "nowhere:Nothing"),
        ("event_type", "json:dumps"),
        ("event_type", int),
        ("min_free_bytes", -1),
        ("max_files", 0),
        ("max_in_flight", 0),
        ("max_in_flight", 65),
        ("max_in_flight", "1e1"),
        ("backoff_max", 0),
        ("retry_after_max", 0),
        ("backoff_max", 86_401),
        ("call_timeout", -1),
        ("call_timeout", 10**400),
        ("stop_after_rejected_batches", -1),
        ("stop_after_rejected_batches", "never"),
        ("max_age", 0),
        ("max_age", "nan"),
        ("max_age", 1e300),
        ("compress_after", 0),
        ("compress_after", "never"),
        ("max_dead_bytes", -1),
        ("max_quarantine_bytes", "lots"),
        ("on_quarantine_full", "burn"),
        ("before_send", 5),
        ("before_send", "nowhere:nothing"),
        ("before_send", "json:nothing"),
        ("before_send", "asyncio:sleep"),
        ("on_drop", "json"),
        ("on_drop", "json:__name__"),
        ("on_dead_letter", "print"),
    ],
)
def test_the_error_for_an_invalid_value_names_the_setting_its_source_and_valid_values(name: str, value: object) -> None:
    """From a keyword and, if the value is text, from the environment. It is one line."""
    with pytest.raises(ConfigurationError) as caught:
        resolve({name: value})
    assert caught.value.setting == name
    assert str(caught.value) == f"{name} = {value!r} (from the call): {caught.value.advice}"
    assert caught.value.advice.startswith("use ")
    assert "\n" not in str(caught.value)
    if isinstance(value, str) and value and "\0" not in value:
        with pytest.raises(ConfigurationError, match=f"environment PILLARBOX_{name.upper()}"):
            resolve({}, {f"PILLARBOX_{name.upper()}": value})


def test_the_error_for_an_unknown_setting_suggests_a_similar_one(tmp_path: Path) -> None:
    """It also names the file."""
    with pytest.raises(ConfigurationError, match=r"^unknown setting 'batch_siz'; did you mean 'batch_size'\?$"):
        Outbox(str(tmp_path), batch_siz=5)
    with pytest.raises(ConfigurationError, match=r"^unknown setting 'colour'; help\(pillarbox\.Outbox\) lists the settings$"):
        Outbox(str(tmp_path), colour="red")
    config = tmp_path / "pillarbox.toml"
    config.write_text("[outbox]\nbatch_siz = 5\n")
    with pytest.raises(ConfigurationError, match=r"pillarbox\.toml, \[outbox\]: unknown setting 'batch_siz'; did you mean"):
        resolve({}, config=str(config))


def test_sink_and_sinks_exclude_each_other_within_one_source(tmp_path: Path) -> None:
    """A source with higher priority replaces one with the other."""
    url = "sqlite:///a.db"
    for sink in (url, RecordingSink()):
        with pytest.raises(ConfigurationError, match=r"^pass either sink or sinks, not both$"):
            Outbox(str(tmp_path), sink=sink, sinks={"a": url})
    with pytest.raises(ConfigurationError, match=r"^environment PILLARBOX_SINKS: pass either sink or sinks, not both$"):
        resolve({}, {"PILLARBOX_SINK": url, "PILLARBOX_SINKS": f"a={url}"})
    assert resolve({"sink": url}, {"PILLARBOX_SINKS": f"a={url}"}).sinks == {}
    assert resolve({"sinks": {"a": url}}, {"PILLARBOX_SINK": url}).sink is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sink", b"https://me:s3cret@host/", "sink: use a URL, a Sink or None, not bytes"),
        ("sinks", "a=https://me:s3cret@host/ a=x", "sinks: two sinks have one name; give each a name of its own"),
        (
            "sinks",
            {"A": "https://me:s3cret@host/"},
            "sinks: 'A' is not a name; use 1 to 32 of the characters a-z, 0-9, _ and -",
        ),
        ("sinks", {"a": "https://me:s3cret@host/", "b": ""}, "sinks: give 'b' a URL, as in b=URL"),
        ("sinks", ["https://me:s3cret@host/"], "sinks: use a table of names and URLs, or text: name=URL name=URL"),
    ],
)
def test_an_error_about_sinks_shows_no_url(name: str, value: object, message: str) -> None:
    """A URL may hold a password."""
    with pytest.raises(ConfigurationError) as caught:
        resolve({name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["[outbox", "outbox = 5", "\xff"])
def test_the_error_for_an_unreadable_toml_file_names_it(tmp_path: Path, text: str) -> None:
    """Also if the file is missing."""
    config = tmp_path / "pillarbox.toml"
    config.write_bytes(text.encode("latin-1"))
    for path in (config, tmp_path / "missing.toml"):
        with pytest.raises(ConfigurationError, match=r"^config = "):
            resolve({}, config=str(path))

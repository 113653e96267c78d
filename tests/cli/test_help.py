"""The help of the commands fits into 80 columns."""

from __future__ import annotations

import inspect

import pytest
import typer
from typer.testing import CliRunner

from pillarbox.cli.main import app

FIRST_LINE_MAX = 55


def first_help_lines(application: typer.Typer, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], dict[str, str]]:
    """The first help line of every command and group, by the words that name its group."""
    first_lines = {
        command.name or "": inspect.getdoc(command.callback).splitlines()[0]  # type: ignore[union-attr]  # each has one
        for command in application.registered_commands
    }
    lines_by_group: dict[tuple[str, ...], dict[str, str]] = {words: first_lines}
    for group in application.registered_groups:
        assert group.typer_instance is not None
        name = group.typer_instance.info.name or ""
        first_lines[name] = (group.typer_instance.info.help or "").splitlines()[0]
        lines_by_group |= first_help_lines(group.typer_instance, (*words, name))
    return lines_by_group


GROUPS = first_help_lines(app)


@pytest.mark.parametrize("words", GROUPS, ids=lambda words: " ".join(words) or "pillarbox")
def test_the_first_line_of_each_command_is_listed_whole_in_80_columns(words: tuple[str, ...]) -> None:
    """`pillarbox --help` and the help of each group list it."""
    completed = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert completed.exit_code == 0
    listed = [line.split(maxsplit=1) for line in completed.output.partition("Commands:")[2].splitlines() if line.strip()]
    listing = {cells[0]: cells[1] for cells in listed if len(cells) > 1}
    assert {name: listing.get(name) for name in GROUPS[words]} == GROUPS[words]
    assert max(map(len, completed.output.splitlines())) <= 80


@pytest.mark.parametrize("words", GROUPS, ids=lambda words: " ".join(words) or "pillarbox")
def test_the_first_line_is_one_short_sentence(words: tuple[str, ...]) -> None:
    """It says what the command does; details follow after a blank line."""
    for name, line in GROUPS[words].items():
        assert len(line) <= FIRST_LINE_MAX, name
        assert line.endswith("."), name
        assert line.count(". ") == 0, name

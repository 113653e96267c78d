"""`pillarbox dead`: look at dead letters, mend them, send them again, or give them up."""

from __future__ import annotations

import shlex
import subprocess
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pillarbox.admin import dead_letters as letters
from pillarbox.admin.dead_letters import DeadLetterGroup, DeadLetterGrouper, DeadLetterRecord
from pillarbox.admin.filters import RecordFilter
from pillarbox.admin.replay import (
    DeadLetterReplayer,
    parse_assignments,
    parse_edited_file,
    to_editable_line,
    unchanged_event,
    with_fields,
)
from pillarbox.admin.scan import FileProblem, list_batches
from pillarbox.admin.text import format_time
from pillarbox.cli.context import (
    AllOption,
    BatchOption,
    CommandContext,
    LimitOption,
    ReasonOption,
    SinceOption,
    UntilOption,
    YesOption,
    plural,
    print_json,
    print_table,
    printable,
    require_filter,
)
from pillarbox.cli.main import ConfigOption, DirectoryOption, EventTypeOption, ExitCode, JsonOption, QuietOption, app, err, out
from pillarbox.errors import UsageError
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import create_private_file, read_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.store.directory import Directory

dead = typer.Typer(
    name="dead",
    help="Dead letters: events that a destination refused for good. Look, mend, send again, give up.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=app.info.context_settings,
)
app.add_typer(dead)

_EDIT_PREFIX = "mend-"  # how the names of files begin that an editor works on

RecordArgument = Annotated[
    list[str] | None, typer.Argument(metavar="RECORD", help="By name, as `dead list --each` shows it.", show_default=False)
]
CodeOption = Annotated[
    list[str] | None, typer.Option("--code", metavar="CODE", help="Refused with this code.", show_default=False)
]
KeyOption = Annotated[list[str] | None, typer.Option("--event-key", metavar="KEY", help="With this key.", show_default=False)]
IdOption = Annotated[list[str] | None, typer.Option("--event-id", metavar="ID", help="With this id.", show_default=False)]
DeadSinkOption = Annotated[
    list[str] | None, typer.Option("--sink", metavar="TEXT", help="With this in its destination's URL.", show_default=False)
]


class DeadLetterItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One dead letter, in the `--json` of all these commands; times in microseconds since 1970."""

    record: str  # its name, <batch>#<index>
    batch: str
    index: int
    code: str
    reason: str
    sink: str
    attempts: int
    first_at_micros: int
    last_at_micros: int
    event_id: str | None
    event_key: str | None
    queue: str = ""  # whose queue it is in, where there are several sinks
    event: msgspec.Raw | None = None  # `show`: as it stands; `replay` and `edit`: as it goes in again


class DeadLetterListing(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox dead list --json`: groups, or with --each records."""

    records: int
    files: int
    groups: list[DeadLetterGroup]
    items: list[DeadLetterItem]
    problems: list[FileProblem]


def _to_item(record: DeadLetterRecord, event: bytes | None = None, queue: str = "") -> DeadLetterItem:
    found = record.letter
    return DeadLetterItem(
        record=record.name,
        batch=record.batch,
        index=found.index,
        code=found.code,
        reason=found.reason,
        sink=found.sink,
        attempts=found.attempts,
        first_at_micros=found.first_at_micros,
        last_at_micros=found.last_at_micros,
        event_id=record.event_id,
        event_key=record.event_key,
        queue=queue,
        event=None if event is None else msgspec.Raw(event),
    )


def _find_records(site: CommandContext, selection: RecordFilter, place: Directory) -> Iterator[DeadLetterRecord]:
    """The dead letters in a directory, or in a queue, that are meant, file by file."""
    found = list_batches(place, Kind.DEAD, selection.matches_batch)
    for file in letters.read_files(place, found.batches, site.heading):
        site.report.add_problems(*file.problems)
        yield from filter(selection.matches, file.records)


def _find_all(site: CommandContext, selection: RecordFilter) -> Iterator[tuple[str, DeadLetterRecord]]:
    """These, of the directory and of each queue in it, with the sink whose queue that is."""
    for place in site.directories:
        for record in _find_records(site, selection, place):
            yield "" if place is site.directory else place.sink, record


@dead.command("list")
def list_(
    record: RecordArgument = None,
    directory: DirectoryOption = None,
    code: CodeOption = None,
    reason: ReasonOption = None,
    event_key: KeyOption = None,
    event_id: IdOption = None,
    sink: DeadSinkOption = None,
    batch: BatchOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    each: Annotated[bool, typer.Option("--each", help="A line for each, instead of one for each kind.")] = False,
    limit: LimitOption = 50,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """List what was refused: one line for all that have code, destination, key and reason in common, values left out.

    An option that is given several times means any of them; different options must all fit. Times are those of the last
    attempt. Safe at any time: takes no lock and changes nothing.
    """
    site = CommandContext(config, directory=directory, event_type=event_type)
    selection = site.parse_filter(
        records=record, codes=code, reasons=reason, event_keys=event_key, event_ids=event_id, sinks=sink, batches=batch,
        since=since, until=until,
    )  # fmt: skip
    groups, shown, count, batches = DeadLetterGrouper(), [], 0, set()
    for queue, one in _find_all(site, selection):
        count += 1
        batches.add((queue, one.batch))
        if not each:
            groups.add(one, queue)
        elif not limit or count <= limit:
            shown.append(_to_item(one, queue=queue))
    found, files = groups.largest_first(), len(batches)
    more = len(found) - limit if limit and not each else count - len(shown) if each else 0
    if limit:
        found = found[:limit]
    if json:
        print_json(DeadLetterListing(records=count, files=files, groups=found, items=shown, problems=site.report.problems))
    else:
        if each and shown:
            _print_records(shown)
        elif found:
            _print_groups(found)
        left_out = f", {more:,} of the lines are not shown (--limit)" if more > 0 else ""
        out.print(f"{plural(count, 'dead letter')} in {plural(files, 'file')}{left_out}", markup=False)
        site.print_queue_hints(queue for queue, _ in batches)
    site.print_problems()
    return site.exit_code()


def _print_groups(found: list[DeadLetterGroup]) -> None:
    columns = [(name, "left") for name in ("code", "key", "destination", "first", "last", "reason")]
    rows = [
        (group.count, group.code, _or_dash(group.event_key), _destination(group.queue, group.sink),
         format_time(group.first_at_micros), format_time(group.last_at_micros), group.reason)
        for group in found
    ]  # fmt: skip
    print_table([("count", "right"), *columns], rows)


def _print_records(shown: list[DeadLetterItem]) -> None:
    columns = [(name, "left") for name in ("record", "event id", "key", "last", "code", "reason")]
    if several := any(one.queue for one in shown):
        columns.insert(0, ("sink", "left"))
    rows = [
        (*([one.queue or "-"] if several else []), one.record, _or_dash(one.event_id), _or_dash(one.event_key),
         format_time(one.last_at_micros), one.code, one.reason)
        for one in shown
    ]  # fmt: skip
    print_table(columns, rows)


def _destination(queue: str, sink: str) -> str:
    return f"{queue}: {sink}" if queue else sink


def _or_dash(text: str | None) -> str:
    return "-" if text is None else text


@dead.command("show")
def show(
    record: RecordArgument = None,
    directory: DirectoryOption = None,
    code: CodeOption = None,
    reason: ReasonOption = None,
    event_key: KeyOption = None,
    event_id: IdOption = None,
    sink: DeadSinkOption = None,
    batch: BatchOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: LimitOption = 20,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Show dead letters in full: the event, why it was refused, by whom, how often it was tried and when.

    Safe at any time: takes no lock and changes nothing.
    """
    site = CommandContext(config, directory=directory, event_type=event_type)
    selection = site.parse_filter(
        records=record, codes=code, reasons=reason, event_keys=event_key, event_ids=event_id, sinks=sink, batches=batch,
        since=since, until=until,
    )  # fmt: skip
    shown, count = [], 0
    for queue, one in _find_all(site, selection):
        count += 1
        if not limit or count <= limit:
            shown.append(_to_item(one, bytes(one.letter.event), queue))
    if json:
        print_json(shown)
    else:
        for letter in shown:
            out.print(_describe_item(letter), markup=False)
        if count > len(shown):
            out.print(f"{count - len(shown):,} more are not shown (--limit)", markup=False)
        elif not count:
            out.print("no such dead letter", markup=False)
    site.print_problems()
    return site.exit_code()


def _describe_item(letter: DeadLetterItem) -> str:
    first, last = format_time(letter.first_at_micros), format_time(letter.last_at_micros)
    times = last if first == last else f"{first} to {last}"
    event = msgspec.json.format(bytes(letter.event or b"null"), indent=2).decode().replace("\n", "\n  ")
    return printable(
        f"{letter.record}\n  {letter.code}: {letter.reason}\n"
        f"  refused by {_destination(letter.queue, letter.sink)}, {plural(letter.attempts, 'attempt')}, {times}\n  {event}\n"
    )


class _DeadLetterPreview:
    """What a command that changes something is about to do; the first ones are said, one by one."""

    def __init__(self, lines: list[str], limit: int, *, json: bool, events: bool) -> None:
        self.items: list[DeadLetterItem] = []
        self._lines = lines
        self._limit = limit
        self._json = json
        self._events = events
        self._count = 0

    def __call__(self, record: DeadLetterRecord, payload: bytes) -> None:
        """One more."""
        self._count += 1
        if self._json:
            self.items.append(_to_item(record, payload if self._events else None))
        elif not self._limit or self._count <= self._limit:
            letter = record.letter
            what = f"{record.name}  {_or_dash(record.event_id)}  {_or_dash(record.event_key)}  {letter.code}: {letter.reason}"
            self._lines.append(what + (f"\n  {payload.decode()}" if self._events else ""))
        elif self._count == self._limit + 1:
            self._lines.append("...")


@dead.command("replay")
def replay(
    record: RecordArgument = None,
    directory: DirectoryOption = None,
    code: CodeOption = None,
    reason: ReasonOption = None,
    event_key: KeyOption = None,
    event_id: IdOption = None,
    sink: DeadSinkOption = None,
    batch: BatchOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    yes: YesOption = False,
    limit: LimitOption = 20,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Send dead letters again, as they are: for when the destination was at fault and has been put right.

    The events go into the outbox under their own ids and are delivered like all others; each leaves the dead letters once it
    is durable there. Killed in between, an event may go in twice, under one id. What the event type does not take stays, and
    is named: see `dead edit`. Without --yes nothing is done.
    """
    site = CommandContext(config, quiet=quiet, directory=directory, event_type=event_type)
    selection = site.parse_filter(
        records=record, codes=code, reasons=reason, event_keys=event_key, event_ids=event_id, sinks=sink, batches=batch,
        since=since, until=until,
    )  # fmt: skip
    require_filter(selection, everything=everything)
    return _replay_records(
        site,
        selection,
        unchanged_event,
        _DeadLetterPreview(site.item_lines, limit, json=json, events=False),
        yes=yes,
        json=json,
    )


def _replay_records(
    site: CommandContext,
    selection: RecordFilter,
    mend: Callable[[DeadLetterRecord], bytes | None],
    seen: _DeadLetterPreview,
    *,
    yes: bool,
    json: bool,
    how: str = "--yes",
) -> int:
    site.require_single_directory(Kind.DEAD)
    changes = DeadLetterReplayer(site.directory, site.heading, site.clock, selection, site.report).replay_changes(
        site.gate, mend, seen
    )
    if not site.apply_changes(changes, yes=yes, sends=True):
        return site.print_locked()
    done = f"{plural(site.report.events, 'event')} of {plural(site.report.files, 'file')}"
    text = site.summary(done, "went back into the outbox", "would go back into the outbox", yes=yes, how=how)
    return site.print_result(seen.items, text, yes=yes, json=json)


@dead.command("purge")
def purge(
    record: RecordArgument = None,
    directory: DirectoryOption = None,
    code: CodeOption = None,
    reason: ReasonOption = None,
    event_key: KeyOption = None,
    event_id: IdOption = None,
    sink: DeadSinkOption = None,
    batch: BatchOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    yes: YesOption = False,
    limit: LimitOption = 20,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Give dead letters up for good. The ledger counts them as purged. Without --yes nothing is done."""
    site = CommandContext(config, quiet=quiet, directory=directory, event_type=event_type)
    selection = site.parse_filter(
        records=record, codes=code, reasons=reason, event_keys=event_key, event_ids=event_id, sinks=sink, batches=batch,
        since=since, until=until,
    )  # fmt: skip
    require_filter(selection, everything=everything)
    site.require_single_directory(Kind.DEAD)
    seen = _DeadLetterPreview(site.item_lines, limit, json=json, events=False)
    changes = DeadLetterReplayer(site.directory, site.heading, site.clock, selection, site.report).purge_changes(seen)
    if not site.apply_changes(changes, yes=yes, sends=False):
        return site.print_locked()
    done = f"{plural(site.report.events, 'dead letter')} of {plural(site.report.files, 'file')}"
    text = site.summary(done, "purged", "would be gone for good", yes=yes)
    return site.print_result(seen.items, text, yes=yes, json=json)


@dead.command("edit")
def edit(
    record: RecordArgument = None,
    directory: DirectoryOption = None,
    code: CodeOption = None,
    reason: ReasonOption = None,
    event_key: KeyOption = None,
    event_id: IdOption = None,
    sink: DeadSinkOption = None,
    batch: BatchOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="MEMBER=VALUE", help="JSON where the member takes it, else text.", show_default=False),
    ] = None,
    from_file: Annotated[
        str | None, typer.Option("--from", metavar="FILE", help="Take what an editor left there.", show_default=False)
    ] = None,
    editor: Annotated[str, typer.Option(envvar=["VISUAL", "EDITOR"], metavar="COMMAND", help="Used without --set.")] = "vi",
    yes: YesOption = False,
    limit: LimitOption = 20,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Put dead letters right and send them again: with --set, or in an editor, one a line.

    Only what was changed, is valid and has kept its id goes in; all else stays a dead letter, and is named. The file that was
    edited is kept until all of it went in: `--from FILE` takes it again. Without --yes nothing is done.
    """
    site = CommandContext(config, quiet=quiet, directory=directory, event_type=event_type)
    if values and from_file is not None:
        raise UsageError("--set and --from: give one of them")
    chosen = site.parse_filter(
        records=record, codes=code, reasons=reason, event_keys=event_key, event_ids=event_id, sinks=sink, batches=batch,
        since=since, until=until,
    )  # fmt: skip
    seen = _DeadLetterPreview(site.item_lines, limit, json=json, events=True)
    if values:
        require_filter(chosen, everything=everything)
        members = parse_assignments(values, site.settings.event_type)
        return _replay_records(
            site, chosen, lambda one: with_fields(site.gate, unchanged_event(one), members), seen, yes=yes, json=json
        )
    if from_file is None:
        require_filter(chosen, everything=everything)
        from_file = _edit_records(site, chosen, editor)
        if from_file is None:
            return site.exit_code() if site.report.problems_count else ExitCode.DONE
    return _replay_edited(site, from_file, seen, yes=yes, json=json)


def _edit_records(site: CommandContext, chosen: RecordFilter, command: str) -> str | None:
    """Have somebody edit the chosen records; the path of the edited file, or None where there is nothing to do."""
    site.require_single_directory(Kind.DEAD)
    lines = b"".join(map(to_editable_line, _find_records(site, chosen, site.directory)))
    site.print_problems()
    if not lines:
        out.print("no such dead letter", markup=False)
        return None
    name = f"{_EDIT_PREFIX}{site.directory.new_id()}.ndjson"
    path = site.directory.path_of(name)
    create_private_file(path, lines)
    try:
        code = subprocess.run([*shlex.split(command), path], check=False).returncode  # noqa: S603 - the user's own editor
    except (OSError, ValueError) as error:
        site.directory.remove(name)
        raise UsageError(f"the editor {command!r} cannot be started: {error}") from None
    if read_file(path) == lines:
        site.directory.remove(name)
        out.print("nothing was changed", markup=False)
        return None
    if code:
        raise UsageError(f"the editor ended with code {code}; nothing was done, and its text is kept: --from {path}")
    return path


def _replay_edited(site: CommandContext, path: str, seen: _DeadLetterPreview, *, yes: bool, json: bool) -> int:
    """Send again what was changed in an edited file."""
    try:
        text = read_file(path)
    except OSError as error:
        raise UsageError(f"--from {path}: {error.strerror}") from None
    back = parse_edited_file(text)
    for number, problem in back.problems:
        site.report.add_problem(path, problem, number)
    left = dict(back.events)

    def mend(one: DeadLetterRecord) -> bytes | None:
        new, old = left.pop(one.name, None), unchanged_event(one)
        if new is None or new == old:
            return None
        site.gate.check_same_id(old, new)
        return new

    if left:
        batches = tuple({name.rpartition("#")[0] for name in left})
        how = f"dead edit --from {shlex.quote(path)} --yes"
        code = _replay_records(site, RecordFilter(batches=batches), mend, seen, yes=yes, json=json, how=how)
    else:
        code = site.print_result([], "nothing to send again", yes=yes, json=json)
    for name in left:
        err.print(printable(f"{path}: {name} is no dead letter, or none any more"), markup=False)
    if yes and code == ExitCode.DONE and not left:
        name = path.rpartition("/")[2]
        if name.startswith(_EDIT_PREFIX) and site.directory.read_small_file(name) == text:
            site.directory.remove(name)
    elif yes:
        err.print(f"the edited text is kept: --from {shlex.quote(path)} takes it again", markup=False)
    return code if not left else code or ExitCode.PARTIAL

"""`pillarbox dead`: show dead letters, replay them, edit and replay them, or delete them."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer

from pillarbox.admin.dead_letters import DeadLetterGroup, DeadLetterGrouper, DeadLetterRecord, read_files
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
from pillarbox.admin.text import counted, format_time
from pillarbox.cli.changes import ChangeContext, require_filter
from pillarbox.cli.options import (
    CONTEXT_SETTINGS,
    AllOption,
    DeadLetterFilterOptions,
    JsonOption,
    LimitOption,
    OutboxOptions,
    QuietOption,
    YesOption,
    expand_options,
)
from pillarbox.cli.output import ExitCode, err, out, print_json, print_table
from pillarbox.errors import UsageError
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import create_private_file, read_file
from pillarbox.system.processes import original_subprocess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.store.directory import Directory

dead = typer.Typer(
    name="dead",
    help="List, show, replay, edit or purge dead letters.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT_SETTINGS,
)

_EDIT_PREFIX: Final = "mend-"  # of the files that an editor works on


class DeadLetterItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One dead letter, in the `--json` of these commands; times in microseconds since 1970."""

    record: str  # name of the dead letter: <batch>#<index>
    batch: str  # batch id
    index: int  # position among the good records of its batch, from 0
    code: str  # rejection code
    reason: str  # why the destination rejected it
    sink: str  # URL of the destination that rejected it
    attempts: int  # number of calls that contained it
    first_at_micros: int  # time of the first attempt
    last_at_micros: int  # time of the last attempt
    event_id: str | None  # id of the event; None if it has none
    event_key: str | None  # key of the event; None if it has none
    queue: str = ""  # name of the sink whose queue holds it; absent with a single sink
    event: msgspec.Raw | None = None  # `show`: the event as it was rejected; `edit`: as it is replayed


class DeadLetterListing(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox dead list --json`: groups, or with --each records."""

    records: int  # number of dead letters that match
    files: int  # number of files that contain them
    groups: list[DeadLetterGroup]  # without --each: the dead letters by code, reason, sink and event key
    items: list[DeadLetterItem]  # with --each: the dead letters
    problems: list[FileProblem]  # files and lines that could not be read


def _to_item(record: DeadLetterRecord, event: bytes | None = None, queue: str = "") -> DeadLetterItem:
    letter = record.letter
    return DeadLetterItem(
        record=record.name,
        batch=record.batch,
        index=letter.index,
        code=letter.code,
        reason=letter.reason,
        sink=letter.sink,
        attempts=letter.attempts,
        first_at_micros=letter.first_at_micros,
        last_at_micros=letter.last_at_micros,
        event_id=record.event_id,
        event_key=record.event_key,
        queue=queue,
        event=None if event is None else msgspec.Raw(event),
    )


def _find_records(context: ChangeContext, record_filter: RecordFilter, directory: Directory) -> Iterator[DeadLetterRecord]:
    """The matching dead letters of a directory, or of a queue, file by file."""
    batches = list_batches(directory, Kind.DEAD, record_filter.matches_batch).batches
    for file in read_files(directory, batches, context.identity_decoder):
        context.report.add_problems(*file.problems)
        yield from filter(record_filter.matches, file.records)


def _find_all(context: ChangeContext, record_filter: RecordFilter) -> Iterator[tuple[str, DeadLetterRecord]]:
    """(sink, record) of the directory, where the sink is "", and of each queue."""
    for directory in context.directories:
        for record in _find_records(context, record_filter, directory):
            yield "" if directory is context.directory else directory.sink, record


@dead.command("list")
@expand_options
def list_(
    options: OutboxOptions,
    filters: DeadLetterFilterOptions,
    each: Annotated[bool, typer.Option("--each", help="List each dead letter instead of groups.")] = False,
    limit: LimitOption = 50,
    json: JsonOption = False,
) -> int:
    """List dead letters, grouped by what they share.

    A group shares code, destination, event key and reason; values within a reason are left out. --since and --until compare
    the time of the last attempt. Several values of one filter: any may match; several filters: all must match. Safe at any
    time: takes no lock and changes nothing.
    """
    context = ChangeContext(options.load_settings())
    grouper, items, count, batches = DeadLetterGrouper(), [], 0, set()
    for queue, record in _find_all(context, filters.to_filter(context.clock.micros())):
        count += 1
        batches.add((queue, record.batch))
        if not each:
            grouper.add(record, queue)
        elif not limit or count <= limit:
            items.append(_to_item(record, queue=queue))
    groups = grouper.largest_first()
    hidden = count - len(items) if each else len(groups) - limit if limit else 0
    if limit:
        groups = groups[:limit]
    if json:
        print_json(
            DeadLetterListing(records=count, files=len(batches), groups=groups, items=items, problems=context.report.problems)
        )
    else:
        if each and items:
            _print_items(items)
        elif groups:
            _print_groups(groups)
        more = f"; {counted(hidden, 'row')} not shown (see --limit)" if hidden > 0 else ""
        out.print(f"{counted(count, 'dead letter')} in {counted(len(batches), 'file')}{more}")
        context.print_queue_hints(queue for queue, _ in batches)
    context.print_problems()
    return context.exit_code()


def _print_groups(groups: list[DeadLetterGroup]) -> None:
    columns = [(name, "left") for name in ("code", "key", "destination", "first", "last", "reason")]
    rows = [
        (group.count, group.code, _or_dash(group.event_key), _destination(group.queue, group.sink),
         format_time(group.first_at_micros), format_time(group.last_at_micros), group.reason)
        for group in groups
    ]  # fmt: skip
    print_table([("count", "right"), *columns], rows)


def _print_items(items: list[DeadLetterItem]) -> None:
    columns = [(name, "left") for name in ("record", "event id", "key", "last", "code", "reason")]
    if several := any(item.queue for item in items):
        columns.insert(0, ("sink", "left"))
    rows = [
        (*([item.queue or "-"] if several else []), item.record, _or_dash(item.event_id), _or_dash(item.event_key),
         format_time(item.last_at_micros), item.code, item.reason)
        for item in items
    ]  # fmt: skip
    print_table(columns, rows)


def _destination(queue: str, sink: str) -> str:
    return f"{queue}: {sink}" if queue else sink


def _or_dash(text: str | None) -> str:
    return "-" if text is None else text


@dead.command("show")
@expand_options
def show(options: OutboxOptions, filters: DeadLetterFilterOptions, limit: LimitOption = 20, json: JsonOption = False) -> int:
    """Show dead letters in full: event, reason, attempts.

    Safe at any time: takes no lock and changes nothing.
    """
    context = ChangeContext(options.load_settings())
    items, count = [], 0
    for queue, record in _find_all(context, filters.to_filter(context.clock.micros())):
        count += 1
        if not limit or count <= limit:
            items.append(_to_item(record, bytes(record.letter.event), queue))
    if json:
        print_json(items)
    else:
        for item in items:
            out.print(*_describe_item(item), sep="\n")
        if count > len(items):
            out.print(f"{count - len(items):,} not shown (see --limit)")
        elif not count:
            out.print("no dead letter matches")
    context.print_problems()
    return context.exit_code()


def _describe_item(item: DeadLetterItem) -> list[str]:
    first, last = format_time(item.first_at_micros), format_time(item.last_at_micros)
    times = last if first == last else f"{first} to {last}"
    event = msgspec.json.format(bytes(item.event or b"null"), indent=2).decode()
    return [
        item.record,
        f"  {item.code}: {item.reason}",
        f"  rejected by {_destination(item.queue, item.sink)}, {counted(item.attempts, 'attempt')}, {times}",
        *(f"  {line}" for line in event.split("\n")),
        "",
    ]


class _DeadLetterPreview:
    """Collects the records that a command changes: as JSON items, or as lines for the first of them."""

    def __init__(self, lines: list[str], limit: int, *, json: bool, events: bool) -> None:
        self.items: list[DeadLetterItem] = []
        self._lines = lines
        self._limit = limit
        self._json = json
        self._events = events
        self._count = 0

    def __call__(self, record: DeadLetterRecord, payload: bytes) -> None:
        """Add a record, and the event as it is replayed."""
        self._count += 1
        if self._json:
            self.items.append(_to_item(record, payload if self._events else None))
        elif not self._limit or self._count <= self._limit:
            letter = record.letter
            line = f"{record.name}  {_or_dash(record.event_id)}  {_or_dash(record.event_key)}  {letter.code}: {letter.reason}"
            self._lines += [line, *([f"  {payload.decode()}"] if self._events else [])]
        elif self._count == self._limit + 1:
            self._lines.append("...")


@dead.command("replay")
@expand_options
def replay(
    options: OutboxOptions,
    filters: DeadLetterFilterOptions,
    everything: AllOption = False,
    yes: YesOption = False,
    limit: LimitOption = 20,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Replay dead letters unchanged, once the cause is fixed.

    Puts the events back into the outbox under their own ids; they are delivered like any other events. Each dead letter is
    removed once its event is durable in the outbox; if the command is killed in between, an event can be enqueued twice, under
    one id. Events that the event type does not accept stay dead letters and are reported: see `pillarbox dead edit`. Without
    --yes nothing is changed.
    """
    context = ChangeContext(options.load_settings(), quiet=quiet)
    record_filter = filters.to_filter(context.clock.micros())
    require_filter(record_filter, everything=everything)
    preview = _DeadLetterPreview(context.item_lines, limit, json=json, events=False)
    return _replay_records(context, record_filter, unchanged_event, preview, yes=yes, json=json)


def _replay_records(
    context: ChangeContext,
    record_filter: RecordFilter,
    edit_record: Callable[[DeadLetterRecord], bytes | None],
    preview: _DeadLetterPreview,
    *,
    yes: bool,
    json: bool,
    how: str = "add --yes to do it",
) -> int:
    context.require_single_directory(Kind.DEAD)
    replayer = DeadLetterReplayer(context.directory, context.identity_decoder, context.clock, record_filter, context.report)
    changes = replayer.replay_changes(context.validator, edit_record, preview)
    if not context.apply_changes(changes, yes=yes, enqueues=True):
        return context.print_lock_conflict()
    count = f"{counted(context.report.events, 'event')} from {counted(context.report.files, 'file')}"
    text = context.summary(count, "replayed", "would be replayed", yes=yes, how=how)
    return context.print_result(preview.items, text, yes=yes, json=json)


@dead.command("purge")
@expand_options
def purge(
    options: OutboxOptions,
    filters: DeadLetterFilterOptions,
    everything: AllOption = False,
    yes: YesOption = False,
    limit: LimitOption = 20,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Delete dead letters.

    The ledger counts them as purged. Without --yes nothing is changed.
    """
    context = ChangeContext(options.load_settings(), quiet=quiet)
    record_filter = filters.to_filter(context.clock.micros())
    require_filter(record_filter, everything=everything)
    context.require_single_directory(Kind.DEAD)
    preview = _DeadLetterPreview(context.item_lines, limit, json=json, events=False)
    replayer = DeadLetterReplayer(context.directory, context.identity_decoder, context.clock, record_filter, context.report)
    if not context.apply_changes(replayer.purge_changes(preview), yes=yes, enqueues=False):
        return context.print_lock_conflict()
    count = f"{counted(context.report.events, 'dead letter')} in {counted(context.report.files, 'file')}"
    text = context.summary(count, "deleted", "would be deleted", yes=yes)
    return context.print_result(preview.items, text, yes=yes, json=json)


@dead.command("edit")
@expand_options
def edit(
    options: OutboxOptions,
    filters: DeadLetterFilterOptions,
    everything: AllOption = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Set a field. VALUE is JSON if the field accepts it, otherwise text.",
            show_default=False,
        ),
    ] = None,
    from_file: Annotated[
        str | None,
        typer.Option("--from", metavar="FILE", help="Continue with a file that was edited earlier.", show_default=False),
    ] = None,
    editor: Annotated[
        str, typer.Option(envvar=["VISUAL", "EDITOR"], metavar="COMMAND", help="Editor to use without --set.")
    ] = "vi",
    yes: YesOption = False,
    limit: LimitOption = 20,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Fix dead letters with --set or an editor, and replay.

    Replays only events that were changed, are valid and kept their id; the others stay dead letters and are reported. The
    edited file stays until all of it is replayed: continue with --from FILE. Without --yes nothing is replayed.
    """
    context = ChangeContext(options.load_settings(), quiet=quiet)
    if assignments and from_file is not None:
        raise UsageError("give --set or --from, not both")
    record_filter = filters.to_filter(context.clock.micros())
    preview = _DeadLetterPreview(context.item_lines, limit, json=json, events=True)
    if assignments:
        require_filter(record_filter, everything=everything)
        values = parse_assignments(assignments, context.settings.event_type)

        def set_fields(record: DeadLetterRecord) -> bytes:
            return with_fields(context.validator, unchanged_event(record), values)

        return _replay_records(context, record_filter, set_fields, preview, yes=yes, json=json)
    if from_file is None:
        require_filter(record_filter, everything=everything)
        from_file = _edit_records(context, record_filter, editor)
        if from_file is None:
            return context.exit_code() if context.report.problems_count else ExitCode.DONE
    return _replay_edited(context, from_file, preview, yes=yes, json=json)


def _edit_records(context: ChangeContext, record_filter: RecordFilter, command: str) -> str | None:
    """Open the matching records in an editor; the path of the edited file, or None if there is nothing to replay."""
    context.require_single_directory(Kind.DEAD)
    directory = context.directory
    lines = b"".join(map(to_editable_line, _find_records(context, record_filter, directory)))
    context.print_problems()
    if not lines:
        out.print("no dead letter matches")
        return None
    name = f"{_EDIT_PREFIX}{directory.new_id()}.ndjson"
    path = directory.path_of(name)
    create_private_file(path, lines)
    try:
        code = original_subprocess().run([*shlex.split(command), path], check=False).returncode  # the user's own editor
    except (OSError, ValueError) as error:
        directory.remove(name)
        raise UsageError(f"the editor {command!r} cannot be started: {error}; name another with --editor") from None
    if read_file(path) == lines:
        directory.remove(name)
        out.print("nothing was edited")
        return None
    if code:
        raise UsageError(f"the editor exited with {code}; nothing was replayed. To replay the edited file: --from {path}")
    return path


def _replay_edited(context: ChangeContext, path: str, preview: _DeadLetterPreview, *, yes: bool, json: bool) -> int:
    """Replay the events of an edited file that were changed."""
    try:
        text = read_file(path)
    except OSError as error:
        raise UsageError(f"--from {path}: {error.strerror}") from None
    edited = parse_edited_file(text)
    for number, problem in edited.problems:
        context.report.add_problem(path, problem, number)
    remaining = dict(edited.events)

    def take_edited(record: DeadLetterRecord) -> bytes | None:
        new, old = remaining.pop(record.name, None), unchanged_event(record)
        if new is None or new == old:
            return None
        context.validator.check_same_id(old, new)
        return new

    if remaining:
        batches = tuple({name.rpartition("#")[0] for name in remaining})
        how = f"to do it: pillarbox dead edit --from {shlex.quote(path)} --yes"
        code = _replay_records(context, RecordFilter(batches=batches), take_edited, preview, yes=yes, json=json, how=how)
    else:
        code = context.print_result([], "nothing to replay", yes=yes, json=json)
    for name in remaining:
        err.print(f"{path}: {name} is not, or no longer, a dead letter")
    if yes and code == ExitCode.DONE and not remaining:
        name = path.rpartition("/")[2]
        if name.startswith(_EDIT_PREFIX) and context.directory.read_small_file(name) == text:
            context.directory.remove(name)
    elif yes:
        err.print(f"the edited file stays; to continue: --from {shlex.quote(path)}")
    return code if not remaining else code or ExitCode.PARTIAL

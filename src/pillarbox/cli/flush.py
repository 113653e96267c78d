"""`pillarbox flush`: seal, and wait until everything is delivered."""

from __future__ import annotations

import msgspec

from pillarbox.admin.text import counted
from pillarbox.cli.options import DirectoryOptions, JsonOption, QuietOption, expand_options
from pillarbox.cli.output import ExitCode, out, print_json
from pillarbox.cli.seal import SealContext, TimeoutOption, seal_directory


class FlushResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox flush --json`."""

    directory: str  # the outbox directory
    batches: int  # number of batches that were pending when everything was sealed
    pending_batches: int  # how many of these are still pending
    unsealed: list[str]  # names of segments that were not sealed
    pending_sinks: list[str]  # with several sinks: the names of those with pending batches
    reason: str  # why something is left; "" if nothing is
    seconds: float  # how long the command took


@expand_options
def flush(
    options: DirectoryOptions, timeout: TimeoutOption = 30.0, quiet: QuietOption = False, json: JsonOption = False
) -> int:
    """Seal all segments and wait until they are delivered.

    Waits until every sink has all batches that were sealed by then; another process delivers them. Exits with 1 if something
    is left after --timeout seconds, and says which process delivers and in which state it is.
    """
    context = SealContext(options.load_settings(), timeout, quiet=quiet)
    sealed = seal_directory(context)
    batches = pending = context.pending_batches()
    if not sealed.unsealed:
        pending = _wait_for_delivery(context, batches)
    directories = context.directories_with(pending)
    reason = sealed.reason
    if not sealed.unsealed and pending:
        reason = f"not delivered after {timeout:g} s; {context.describe_workers(directories)}"
    result = FlushResult(
        directory=context.directory.path,
        batches=len(batches),
        pending_batches=len(pending),
        unsealed=sealed.unsealed,
        pending_sinks=sorted(filter(None, directories)),
        reason=reason,
        seconds=context.seconds,
    )
    if json:
        print_json(result)
    else:
        count = f"delivered {len(batches) - len(pending):,} of {counted(len(batches), 'batch', 'batches')}"
        out.print(f"{count}; {reason}" if reason else "everything is delivered")
    return ExitCode.PARTIAL if reason else ExitCode.DONE


def _wait_for_delivery(context: SealContext, batches: set[str]) -> set[str]:
    """The batches that are still pending at the deadline."""
    pending = before = batches
    with context.show_progress("deliver", len(batches)) as show:
        for _ in context.poll_until_deadline():
            listed = context.pending_batches()
            # Delivered means missing from two listings: one can miss a file that is renamed meanwhile.
            pending = pending & (listed | before)
            before = listed
            show(len(pending))
            if not pending:
                break
    return pending

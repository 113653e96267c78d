"""House rules that no linter checks: sizes, imports, and which modules may access the disk or read the time."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pillarbox"
MODULES = sorted(PACKAGE.rglob("*.py"))
ALL_PYTHON = sorted([*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])
structure = runpy.run_path(str(ROOT / "tools" / "structure"))
REPLACED_MODULES = {
    "_thread",
    "multiprocessing",
    "queue",
    "select",
    "selectors",
    "socket",
    "subprocess",
    "threading",
}
SLEEPS = {"sleep", "usleep", "nanosleep", "sigtimedwait"}
WAIT_COMMENT = "# wait: "
MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70

# The parts of the package that each part may import. The parts that are missing here may import everything.
ALLOWED_IMPORTS = {
    "store": {"_native", "errors", "clock", "forks", "outcome"},
    "sinks": {"errors", "clock", "event", "outcome", "redaction", "store"},  # of the store, only the function that reads a file
    "delivery": {"errors", "clock", "forks", "hooks", "log_records", "redaction", "settings", "stats", "store", "sinks"},
    "admin": {"errors", "clock", "codec", "delivery", "event", "outcome", "sinks", "store"},
    "telemetry": {"stats"},
    "stats": set(),
    "codec": {"_native", "errors", "event", "hooks", "outcome", "settings", "store"},
    "event": {"_native", "errors", "clock", "forks"},
    "forks": {"_native"},
    "log_records": {"forks"},
    "outcome": set(),
    "errors": {"redaction"},
    "redaction": set(),
    "clock": set(),
    "system": {"clock"},
    "_native": {"_speedups", "outcome"},
    "settings": {"delivery", "errors", "event", "outcome", "redaction", "store"},
}
# Within the store, the writing and the reading side do not import each other.
FORBIDDEN_IMPORTS = [("store/writer.py", "reader"), ("store/reader.py", "writer"), ("store/sealer.py", "reader")]

# Modules that may use `os`, and the names they may use. Only one module may use `open`, and only one `time`.
OS_NAMES = {
    "store/os_filesystem.py": None,  # everything
    "store/ownership.py": {"O_CLOEXEC", "O_RDONLY", "close", "geteuid", "open", "path", "read", "stat", "stat_result"},
    "_native.py": {"environ"},  # PILLARBOX_PURE_PYTHON
    "event.py": {"urandom"},
    "store/open_files.py": {"O_RDWR", "close", "devnull", "fsdecode", "listdir", "open", "path", "readlink"},
    "forks.py": {"getpid", "register_at_fork", "stat"},
    "outbox.py": {"PathLike"},
    "delivery/process/child.py": {"_exit", "dup2"},
    "system/processes.py": {"O_RDONLY", "POSIX_SPAWN_CLOSE", "POSIX_SPAWN_DUP2", "POSIX_SPAWN_OPEN", "devnull", "environ"},
    "sinks/spacetimedb/url.py": {"environ"},  # may hold a token
    "sinks/http/sink.py": {"environ"},  # variables that the URL names
    "delivery/lease.py": {"getpid"},
    "exporters/__init__.py": {"environ"},  # the variables of OpenTelemetry
    "exporters/collector.py": {"getpid"},
    "testing/crash.py": {"strerror"},
    "testing/fault.py": {"strerror"},
    "cli/context.py": {"environ"},
    "cli/output.py": {"dup2", "fdopen", "open", "devnull", "O_WRONLY"},  # a closed pipe, or no stream at all
    "cli/signals.py": {"_exit"},
    "cli/streams.py": {"isatty", "write"},
}


def relative(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def imports_of(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("module", ALL_PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_and_functions_are_short(module: Path) -> None:
    """A module has at most 600 lines, a function at most 70."""
    text = module.read_text()
    assert text.count("\n") <= MODULE_LINES_MAX
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES_MAX, node.name


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_a_part_imports_only_what_the_architecture_allows(module: Path) -> None:
    """Imports between layers have one direction."""
    name = relative(module)
    part = name.partition("/")[0].removesuffix(".py")
    allowed = ALLOWED_IMPORTS.get(part)
    ours = {path.split(".")[1] for path in imports_of(ast.parse(module.read_text())) if path.startswith("pillarbox.")}
    if allowed is not None:
        assert ours <= allowed | {part, "system"}  # which stands for the standard library


@pytest.mark.parametrize(("module", "forbidden"), FORBIDDEN_IMPORTS)
def test_writer_and_reader_do_not_import_each_other(module: str, forbidden: str) -> None:
    """They communicate only through files."""
    assert not any(forbidden in path.split(".") for path in imports_of(ast.parse((PACKAGE / module).read_text())))


def os_names(tree: ast.AST) -> set[str]:
    names = {path.partition(".")[2] for path in imports_of(tree) if path.startswith("os.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            names.add(node.attr)
    return names


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_only_one_module_accesses_the_disk_and_only_one_reads_the_time(module: Path) -> None:
    """So the crash tests can replace both."""
    name, tree = relative(module), ast.parse(module.read_text())
    allowed = OS_NAMES.get(name, set())
    if allowed is not None:
        assert os_names(tree) <= allowed
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "open"]
        assert not imports_of(tree) & {"shutil", "pathlib.Path", "io.open", "tempfile", "glob"}
    if name != "clock.py":
        assert not imports_of(tree) & {"time", "datetime"}


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_threads_and_what_waits_are_those_of_the_system(module: Path) -> None:
    """The libraries gevent and eventlet patch these modules; only the package `system` has the unpatched ones."""
    name, tree = relative(module), ast.parse(module.read_text())
    if name.startswith("system/") or name == "cli/signals.py":  # it ends the interpreter, which waits for all threads
        return
    assert not {path.split(".")[0] for path in imports_of(tree)} & REPLACED_MODULES
    calls = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert name.startswith("cli/") or not calls & {"asyncio.run", "asyncio.to_thread", "asyncio.new_event_loop"}


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_only_the_directory_deletes_and_renames(module: Path) -> None:
    """Each operation on the disk has one owner."""
    name, tree = relative(module), ast.parse(module.read_text())
    if name in ("store/directory.py", "store/filesystem.py", "store/os_filesystem.py", "testing/fault.py"):
        return
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"unlink", "rename", "rmtree"}


def prints_of(tree: ast.AST) -> list[int]:
    """The lines that write to a standard stream, or could: `print`, `typer.echo`, a console, `sys.stdout`."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if name in {"echo", "secho", "Console"} or (name == "print" and owner not in {"out", "err", "console"}):
                lines.append(node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr.strip("_") in {"stdout", "stderr"}:
            if isinstance(node.value, ast.Name) and node.value.id == "sys":
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & {
            "stdout",
            "stderr",
            "echo",
            "Console",
        }:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_only_one_module_prints(module: Path) -> None:
    """It escapes what other programs wrote: names of files, events, answers of servers."""
    if relative(module) != "cli/output.py":
        assert not prints_of(ast.parse(module.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "print(name)",
        "typer.echo(name)",
        "Console().print(name)",
        "stream.print(name)",
        "sys.stdout.write(name)",
        "log(stream=sys.stderr)",
        "sys.__stdout__.buffer.write(name)",
        "from sys import stdout",
        "from rich.console import Console",
    ],
)
def test_every_form_of_printing_is_detected(text: str) -> None:
    """Also what is only passed on."""
    assert prints_of(ast.parse(text))


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_every_log_line_passes_the_filter_that_escapes(module: Path) -> None:
    """Only one logger has it, and a filter does not apply to the loggers below."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "getLogger" and node.args:
            name = node.args[0]
            relayed = relative(module) in {
                "delivery/process/supervisor.py",
                "log_records.py",
            }  # the name that a record has
            assert relayed or (isinstance(name, ast.Constant) and name.value == "pillarbox")


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_every_module_has_a_docstring_and_no_assert(module: Path) -> None:
    """`python -O` removes assertions."""
    tree = ast.parse(module.read_text())
    assert ast.get_docstring(tree)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def timed_waits(tree: ast.AST) -> list[ast.expr]:
    """Calls that let time pass: a sleep, a wait for an event that nothing sets, a wait that must time out, a `sleep` process."""
    waits: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            duration = next(iter([*node.args, *(keyword.value for keyword in node.keywords)]), None)
            is_zero = isinstance(duration, ast.Constant) and not duration.value
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            sleeps = name in SLEEPS and duration is not None and not is_zero
            waits_alone = name == "wait" and isinstance(owner, ast.Call) and duration is not None and not is_zero
            selects_nothing = name == "select" and all(isinstance(arg, ast.List) and not arg.elts for arg in node.args[:3])
            if sleeps or waits_alone or (selects_nothing and len(node.args) > 3):
                waits.append(node)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            call = node.operand
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "wait" and call.args:
                waits.append(call)
        elif (
            isinstance(node, ast.List)
            and node.elts
            and isinstance(node.elts[0], ast.Constant)
            and node.elts[0].value == "sleep"
        ):
            waits.append(node)
    return waits


def unexplained_waits(text: str) -> list[int]:
    """The lines of timed waits without a reason: `# wait: ...` on the line itself or on the line above."""
    lines = text.split("\n")
    return [
        wait.lineno
        for wait in timed_waits(ast.parse(text))
        if not any(WAIT_COMMENT in line for line in lines[max(0, wait.lineno - 2) : wait.end_lineno])
    ]


@pytest.mark.parametrize("module", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_test_waits_without_a_reason(module: Path) -> None:
    """Tests set the clock themselves. If real time must pass, a comment says why: `# wait: ...`."""
    assert not unexplained_waits(module.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "import time\ntime.sleep(1)",
        "from time import sleep\nsleep(0.1)",
        "async def test():\n    await asyncio.sleep(pause_s)",
        "threading.Event().wait(0.1)",
        "threading.Event().wait(timeout=0.1)",
        "signal.sigtimedwait([], 1)",
        "assert not done.wait(0.1)",
        "select.select([], [], [], 1)",
        "subprocess.run(['sleep', '1'])",
    ],
)
def test_every_form_of_a_timed_wait_is_detected(text: str) -> None:
    """With a reason, it is accepted."""
    assert unexplained_waits(text)
    last = text.rsplit("\n", maxsplit=1)[-1]
    assert not unexplained_waits(text.replace(last, f"{last}  # wait: the kernel's clock is what is tested"))


@pytest.mark.parametrize("text", ["await_(asyncio.sleep(0))", "assert done.wait(60)", "process.wait(60)"])
def test_a_wait_with_a_limit_is_not_a_timed_wait(text: str) -> None:
    """It ends as soon as the condition is true."""
    assert not unexplained_waits(text)


def test_no_import_cycles() -> None:
    """Imports in functions and imports for type checkers count as well."""
    assert not structure["cycles"](structure["graph_of"](structure["modules_of"](PACKAGE)))


def test_class_names_are_unique() -> None:
    """In the whole package; a leading underscore does not make a name different."""
    assert not structure["names_used_twice"](structure["modules_of"](PACKAGE))


@pytest.mark.parametrize("source", sorted((ROOT / "src" / "speedups").glob("*.c")), ids=lambda path: path.name)
def test_only_one_c_source_reads_the_time(source: Path) -> None:
    """It creates ids and times."""
    assert ("clock_gettime" in source.read_text()) == (source.name == "event.c")

"""Unpatched copies of modules of the standard library.

A new copy of a C module has the original functions, whatever was patched in the module before. The copies are made at import,
so that later patches change the modules and not the copies.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import posix
import sys
from types import ModuleType
from typing import Any


def copy_module(name: str) -> Any:
    """A new copy of a C module, with its original functions."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no module {name}", name=name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_python_module(name: str, **replacements: object) -> Any:
    """A new copy of a Python module that imports `replacements` instead of the modules with these names."""
    spec = importlib.util.find_spec(name)
    code = spec.loader.get_code(name) if spec is not None and hasattr(spec.loader, "get_code") else None  # type: ignore[union-attr]
    if code is None:
        raise ImportError(f"there is no source of the module {name}", name=name)
    module = ModuleType(f"pillarbox copy of {name}")

    def import_module(module_name: str, *others: Any, **keywords: Any) -> Any:
        if module_name in replacements:
            return replacements[module_name]
        return builtins.__import__(module_name, *others, **keywords)

    vars(module)["__builtins__"] = vars(builtins) | {"__import__": import_module}
    exec(code, vars(module))  # noqa: S102 - the standard library's own code
    return module


def original_os() -> Any:
    """A copy of `os` with the original system calls."""
    copy = ModuleType("os")
    vars(copy).update(vars(os))
    vars(copy).update({name: value for name, value in vars(posix).items() if not name.startswith("__") and hasattr(os, name)})
    return copy


thread: Any = copy_module("_thread")
time: Any = copy_module("time")
select: Any = copy_module("select")


def are_threads_replaced() -> bool:
    """Whether `threading` is patched, so that a thread that the application starts is a greenlet."""
    module: Any = sys.modules["_thread"]
    return getattr(module.start_new_thread, "__module__", "") != "_thread"


def are_sockets_replaced() -> bool:
    """Whether `socket` is patched, so that the sockets of the application are those of greenlets."""
    module: Any = sys.modules.get("socket")
    return module is not None and module.socket.__module__ != "socket"


def blocked_threads_problem() -> str:
    """Why threads of this process run only now and then; "" if they run."""
    uwsgi: Any = sys.modules.get("uwsgi")  # the module exists only in uWSGI's processes
    options = getattr(uwsgi, "opt", {})
    if uwsgi is None or "enable-threads" in options or int(options.get("threads", 1)) > 1:
        return ""
    return "uWSGI runs threads of Python during requests only, so that events are sealed and delivered late: add enable-threads"


def replacing_library() -> str:
    """The name of the library that patched `threading`; "" if there is none."""
    module: Any = sys.modules["_thread"]
    return str(module.start_new_thread.__module__).partition(".")[0] if are_threads_replaced() else ""

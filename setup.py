"""The one thing that pyproject.toml cannot say: what is compiled, and left out where it cannot be."""

from setuptools import Extension, setup

NAMES = ("_lines", "_listing", "_speed", "_together", "_waiter")

setup(ext_modules=[Extension(f"pillarbox.store.{name}", [f"src/pillarbox/store/{name}.c"], optional=True) for name in NAMES])

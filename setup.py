"""The one thing that pyproject.toml cannot say: what is compiled, and left out where it cannot be compiled."""

from setuptools import Extension, setup

COMPILED = ("_speed", "_listing")

setup(ext_modules=[Extension(f"pillarbox.store.{name}", [f"src/pillarbox/store/{name}.c"], optional=True) for name in COMPILED])

"""The one thing that pyproject.toml cannot say: what is compiled, and left out where it cannot be."""

from setuptools import Extension, setup

NAMES = ("_event", "store/_lines", "store/_listing", "store/_speed", "store/_together", "store/_waiter")

setup(
    ext_modules=[Extension(f"pillarbox.{name.replace('/', '.')}", [f"src/pillarbox/{name}.c"], optional=True) for name in NAMES]
)

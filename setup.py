"""The one thing that pyproject.toml cannot say: the compiled hot path, which is left out where it cannot be compiled."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("pillarbox.store._speed", ["src/pillarbox/store/_speed.c"], optional=True)])

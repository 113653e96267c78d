"""The one thing that pyproject.toml cannot say: the compiled hot path, which is left out where it cannot be compiled."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("pillarbox._speed", ["src/pillarbox/_speed.c"], optional=True)])

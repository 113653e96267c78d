"""The one thing that pyproject.toml cannot say: what is compiled, and left out where it cannot be compiled."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension("pillarbox.store._speed", ["src/pillarbox/store/_speed.c"], optional=True),
        Extension("pillarbox.store._lines", ["src/pillarbox/store/_lines.c"], optional=True),
    ]
)

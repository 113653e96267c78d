"""The one thing that pyproject.toml cannot say: the compiled hot path, which is left out where it cannot be compiled."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(f"pillarbox.store.{name}", [f"src/pillarbox/store/{name}.c"], optional=True) for name in ("_speed", "_waiter")
    ]
)

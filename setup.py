"""Declares the C extension, which pyproject.toml cannot do. Without a compiler the package is installed without it."""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "pillarbox._speedups",
            sorted(map(str, Path("src/speedups").glob("*.c"))),
            depends=["src/speedups/speedups.h"],
            extra_compile_args=["-fvisibility=hidden"],
            optional=True,
        )
    ]
)

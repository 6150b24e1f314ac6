"""The package of aufast: pyproject.toml has the metadata; this is its own build backend.

`build_kernels.py` compiles csrc/ and lists the variables of the environment that it looks at.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the build hooks; the two below replace theirs
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.dist import Distribution
from setuptools.errors import CompileError

import build_kernels

ROOT = Path(__file__).resolve().parent


def torch_requirement() -> list[str]:
    """Torch, only where the interpreter has none: a second one is never downloaded."""
    torch = build_kernels.find_torch()
    if build_kernels.flag("AUFAST_SKIP_EXT") or (torch is not None and torch.new_enough):
        return []
    return [build_kernels.TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirement()


class BuildKernels(setuptools.Command):
    """Compile the libraries into the package, in place for an editable install."""

    description = "compile csrc/ into aufast/_cpu.so and aufast/_cuda.so"
    user_options = [
        ("inplace", "i", "put the libraries into the source tree"),
        ("build-lib=", "b", "where the package is gathered"),
    ]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.inplace = False
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def outputs(self) -> list[str]:
        built = [f"aufast/_{library.device}.so" for library in build_kernels.plan() if library.sources]
        return [*built, "aufast/_build.json"]

    def get_source_files(self) -> list[str]:
        files = [path for path in sorted(build_kernels.CSRC.rglob("*")) if path.is_file()]
        return [str(path.relative_to(ROOT)) for path in files]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, name)) for name in self.outputs()]

    def get_output_mapping(self) -> dict[str, str]:
        return dict(zip(self.get_outputs(), self.outputs(), strict=True)) if self.editable_mode else {}

    def run(self) -> None:
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "aufast"
        try:
            build_kernels.build(package)
        except build_kernels.BuildError as error:
            raise CompileError(str(error)) from None


class Wheel(bdist_wheel):
    """A wheel for any Python: the libraries hold no Python symbol."""

    def run(self) -> None:
        # Files of an earlier build that are gone from the sources would be packed too.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        compiled = any(library.sources for library in build_kernels.plan())
        return "py3", "none", super().get_tag()[2] if compiled else "any"


class CompiledDistribution(Distribution):
    """Has a compiled part, so that setuptools runs build_ext although no `Extension` is listed."""

    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    setuptools.setup(
        packages=[*setuptools.find_packages(include=["aufast", "aufast.*"]), "aufast.kernels"],
        package_dir={"aufast.kernels": "kernels"},
        package_data={
            "aufast": ["py.typed"],
            "aufast.label": ["report.html"],
            "aufast.train": ["published.json"],
        },
        distclass=CompiledDistribution,
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )

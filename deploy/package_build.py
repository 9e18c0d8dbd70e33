"""How setuptools builds the package: `pyproject.toml` names this class in place of its own `build_py`."""
from __future__ import annotations

import runpy
import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

_MODULES = runpy.run_path(str(Path(__file__).with_name("make_pyz.py")))["modules"]  # as in the single file


class BuildModules(build_py):
    """Takes the modules that the service imports, and nothing else that lies beside them; builds afresh, since what
    an older build left in build/lib would be installed, too."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """See distutils: package, module and file of each module."""
        found: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        wanted = {file.name for file in _MODULES(Path(package_dir))}
        return [each for each in found if Path(each[2]).name in wanted]

    def run(self) -> None:
        """Builds."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

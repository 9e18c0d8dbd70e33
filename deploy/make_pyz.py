"""Makes `smsproxy.pyz`, the whole service in one file that any Python from 3.10 on runs:

    python deploy/make_pyz.py [FILE]
    python smsproxy.pyz --port 8080
"""
from __future__ import annotations

import ast
import shutil
import sys
import tempfile
import zipapp
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START = "__main__"  # the module from which all others are imported
PACKAGES = ("postgres",)  # imported by name, when a setting asks for it
DATA = ("openapi.json", "page.html", "LICENSE")


def modules(root: Path) -> set[Path]:
    """The files of the program: the module that starts it, the packages, and whatever of the directory these import.

    So what else lies in the directory, a provider client for instance, stays out.
    """
    found: set[Path] = set()
    waiting = {root / f"{START}.py", *(file for package in PACKAGES for file in (root / package).glob("*.py"))}
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= {path for name in _imports(file) if (path := root / f"{name}.py").is_file()} - found
    return found


def _imports(file: Path) -> Iterator[str]:
    """The names of the modules that a file imports from anywhere but its own package."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def make(target: Path, root: Path = ROOT) -> None:
    """Writes the archive; an existing file is replaced only when the new one is whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        tree = Path(directory, "tree")
        for file in (*modules(root), *(root / name for name in DATA)):
            copy = tree / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
        made = Path(directory, "smsproxy.pyz")
        zipapp.create_archive(tree, made, "/usr/bin/env python3", compressed=True)
        made.chmod(0o755)
        made.replace(target)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "smsproxy.pyz")
    make(path)
    print(f"made {path}, {path.stat().st_size:,} bytes")

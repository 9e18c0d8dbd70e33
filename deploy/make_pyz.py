"""Makes `smsproxy.pyz`, the whole service in one file that any Python from 3.10 on runs:

    python deploy/make_pyz.py [FILE]
    python smsproxy.pyz --port 8080
"""
from __future__ import annotations

import shutil
import sys
import tempfile
import zipapp
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Named one by one, so that what else lies in the directory, a provider client for instance, stays out.
FILES = (
    "base_repository.py", "batch_scheduler.py", "batching_client.py", "client_statistics.py", "fastsmsing.py",
    "http_front.py", "incident_log.py", "main.py", "memory_repository.py", "message_ids.py", "message_model.py",
    "restapi.py", "service_metrics.py", "smsproxy.py", "sqlite_repository.py", "status_updater.py",
    "worker_threads.py", "openapi.json", "page.html", "LICENSE",
)  # fmt: skip
PACKAGES = ("postgres",)
# The one that zipapp writes loses the exit code.
MAIN = """\
import signal
import sys

if sys.version_info < (3, 10):
    sys.exit("smsproxy needs Python 3.10 or newer")
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports is no traceback

from main import main

sys.exit(main())
"""


def make(target: Path) -> None:
    """Writes the archive; an existing file is replaced only when the new one is whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        tree = Path(directory, "tree")
        tree.mkdir()
        for name in FILES:
            shutil.copy2(ROOT / name, tree)
        for package in PACKAGES:
            for file in (ROOT / package).glob("*.py"):
                (tree / package).mkdir(exist_ok=True)
                shutil.copy2(file, tree / package)
        (tree / "__main__.py").write_text(MAIN)
        made = Path(directory, "smsproxy.pyz")
        zipapp.create_archive(tree, made, "/usr/bin/env python3", compressed=True)
        made.chmod(0o755)
        made.replace(target)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "smsproxy.pyz")
    make(path)
    print(f"made {path}, {path.stat().st_size:,} bytes")

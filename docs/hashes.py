"""Write ``constraints-release.txt``: the pinned versions with the hash of the file that pip chooses for each.

``python docs/hashes.py`` asks pip which files it would install for ``constraints.txt``, so run it on the system and with the
Python that the file is for. It installs nothing.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("torch",)
"""Packages whose file depends on the machine: torch has one build for CPUs and one for each version of CUDA."""
HEADER = """\
# Written by `python docs/hashes.py` from constraints.txt, for {system}. Do not edit.
# To install a release with the files that it was tested with:
#     python -m pip install torch=={torch}
#     python -m pip install --require-hashes --no-deps -r constraints-release.txt
#     python -m pip install --no-deps .
"""


def pins(path: Path) -> dict[str, str]:
    """Return the version of each package in a file of constraints."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return dict(line.split("==", 1) for line in lines if line)


def chosen(packages: dict[str, str]) -> list[Any]:
    """Return pip's report of the files that it would install."""
    requirements = [f"{name}=={version}" for name, version in packages.items()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", str(report)]
        subprocess.run([sys.executable, "-m", "pip", *command, *requirements], check=True)
        files: list[Any] = json.loads(report.read_text())["install"]
    return files


def main() -> None:
    """Write the file."""
    versions = pins(ROOT / "constraints.txt")
    files = chosen({name: version for name, version in versions.items() if name not in LEFT_OUT})
    lines = [
        f"{file['metadata']['name']}=={file['metadata']['version']} "
        f"--hash=sha256:{file['download_info']['archive_info']['hashes']['sha256']}"
        for file in files
    ]
    system = f"Python {sys.version_info.major}.{sys.version_info.minor} on {platform.system()} {platform.machine()}"
    text = HEADER.format(system=system, torch=versions["torch"]) + "".join(f"{line}\n" for line in sorted(lines, key=str.lower))
    (ROOT / "constraints-release.txt").write_text(text)


if __name__ == "__main__":
    main()

"""Collect the wheels of a lock and of ctx-distill in one folder, for a machine without a network (docs/air_gapped.md).

pip checks every download against the hashes of the lock. Source distributions are built here. The folder's own
`requirements.txt` lists the SHA-256 of each wheel, so that the other machine can check them again.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

INSTALL = "pip install --no-index --find-links wheelhouse --require-hashes -r wheelhouse/requirements.txt"


def pip(*arguments: str) -> None:
    """Run this Python's pip."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def collect(lock: Path, wheel: Path, out: Path) -> None:
    """Fill `out` with the wheels of the lock for this Python and platform, and with `wheel`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    pip("download", "--quiet", "--require-hashes", "--no-deps", "--requirement", str(lock), "--dest", str(out))
    for source in [path for path in out.iterdir() if path.suffix != ".whl"]:
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source))
        source.unlink()
    shutil.copy(wheel, out)


def write_requirements(folder: Path) -> int:
    """Write `requirements.txt` of the wheels in a folder, and return their number."""
    wheels = sorted(folder.glob("*.whl"))
    lines = []
    for path in wheels:
        name, version = path.name.split("-")[:2]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{name.replace('_', '-').lower()}=={version} --hash=sha256:{digest}\n")
    (folder / "requirements.txt").write_text("".join(lines), encoding="utf-8")
    return len(wheels)


def main() -> None:
    """Collect the wheels and print what to run on the other machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lock", type=Path, help="requirements/runtime-cpu.txt or requirements/runtime-gpu.txt")
    parser.add_argument("wheel", type=Path, help="wheel of ctx-distill")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced if it exists")
    options = parser.parse_args()
    collect(options.lock, options.wheel, options.out)
    count = write_requirements(options.out)
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"{options.out}: {count} wheels for Python {version}. On the other machine, beside the folder:\n  {INSTALL}")


if __name__ == "__main__":
    main()

"""Is this wheel what it says: any Python 3, small, whole, and at home on any Linux?

The native libraries may need what every manylinux system has and nothing else; the CUDA runtime is inside them, and
nothing of CUDA may be left for the loader to find.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MAX_BYTES = 15_000_000
MANYLINUX = {
    "ld-linux-aarch64.so.1",
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
}


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_library(path: Path) -> list[str]:
    """Faults of one shared library."""
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", output("readelf", "--dynamic", str(path))))
    undefined = re.findall(r" U (\S+)", output("nm", "--dynamic", "--undefined-only", str(path)))
    cuda = [name for name in undefined if re.match(r"_*(cuda|cu[A-Z]|cublas|cusparse|nv[A-Z])", name)]
    versions = {tuple(map(int, v.split("."))) for n in undefined for v in re.findall(r"@GLIBC_([\d.]+)", n)}
    newest = ".".join(map(str, max(versions, default=())))
    print(
        f"  {path.name}: {path.stat().st_size / 1e6:.2f} MB, needs glibc {newest} and {', '.join(sorted(needed))}"
    )
    faults = [f"{path.name} needs {name}" for name in sorted(needed - MANYLINUX)]
    return faults + [f"{path.name} leaves {name} undefined" for name in cuda]


def check(wheel: Path) -> list[str]:
    """All faults of the wheel."""
    faults = []
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.2f} MB")
    if not re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name):
        faults.append(f"the tag of {wheel.name} is not py3-none-<platform>")
    if size >= MAX_BYTES:
        faults.append(f"{size} bytes, {MAX_BYTES} allowed")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        wanted = ["bitsandbytes/__init__.py", "bitsandbytes/py.typed", "bitsandbytes/bnb.h"]
        wanted += ["bitsandbytes/libbitsandbytes_cpu.so"]
        faults += [f"{name} is missing" for name in wanted if name not in names]
        roots = {name.split("/")[0] for name in names}
        faults += [f"stray {root}/" for root in roots if root != "bitsandbytes" and ".dist-info" not in root]
        archive.extractall(folder)
        for library in sorted(Path(folder).rglob("*.so")):
            faults += check_library(library)
    return faults


if __name__ == "__main__":
    found = [fault for name in sys.argv[1:] for fault in check(Path(name))]
    print("\n".join(f"FAULT: {fault}" for fault in found) or "  as it should be")
    sys.exit(1 if found or len(sys.argv) < 2 else 0)

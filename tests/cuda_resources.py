"""What the compiler of CUDA told of each kernel when the core was built: registers, stack, spilled bytes.

``python -m tests.cuda_resources`` prints it; with --write, the most that each kernel takes goes to
``cuda_resources.json``, which a test holds against what it finds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "cuda_resources.json"
LOGS = ROOT / "build" / sys.implementation.cache_tag

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def version(nvcc: str) -> str:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", told)[1]


def kernel_name(mangled: str) -> str:
    """``couple_kernel`` of ``_ZN5pyzoo...13couple_kernelILi4EffEEv...``: the last name; each follows its length."""
    at, name = len("_ZN"), ""
    while length := re.match(r"\d+", mangled[at:]):
        begin = at + len(length[0])
        at = begin + int(length[0])
        name = mangled[begin:at]
    return name


def found() -> dict[str, dict[str, dict[str, int]]]:
    """object/kernel -> architecture -> the most that one of its instances takes."""
    table = {}
    for log in sorted(LOGS.glob("*.cu.o.log")):
        text = log.read_text()
        entries = list(_ENTRY.finditer(text))
        assert len(entries) == text.count("Compiling entry function"), log
        for entry in entries:
            numbers = {name: int(entry[name] or 0) for name in ("registers", "stack", "shared")}
            numbers["spilled"] = int(entry["stores"]) + int(entry["loads"])
            name = f"{log.name.removesuffix('.cu.o.log')}/{kernel_name(entry['name'])}"
            of_arch = table.setdefault(name, {}).setdefault(entry["arch"], numbers)
            table[name][entry["arch"]] = {key: max(value, of_arch[key]) for key, value in numbers.items()}
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    table = {"nvcc": version(args.nvcc), "kernels": found()}
    text = json.dumps(table, indent=1, sort_keys=True) + "\n"
    print(text)
    if args.write:
        TABLE.write_text(text)

"""Writes the table of ratios into README.md: ``python -m benchmarks.readme_table benchmarks/results/NAME.json``.

The file is what ``pyzoo bench --json FILE`` writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from . import suite
from .page import format_ratio

README = suite.ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def table(document: dict) -> str:
    """Geometric means by op and direction, and what they were measured on, as Markdown."""
    lines = ["| operator | direction | cases | geometric mean | from | to |", "|---|---|--:|--:|--:|--:|"]
    for row in suite.summary(document["results"]):
        ratios = " | ".join(format_ratio(row[key]) for key in ("mean", "least", "most"))
        lines.append(f"| {row['op']} | {row['direction']} | {row['cases']} | {ratios} |")
    what = ", ".join(f"{name} {document['versions'][name]}" for name in ("torch", "torchvision"))
    return "\n".join([*lines, "", f"{suite.summary_line(document)}; {what}; commit {document['commit']}."])


def insert(text: str, content: str) -> str:
    """``text`` with ``content`` between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{README.name} must have the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        sys.exit(__doc__)
    document = json.loads(Path(argv[0]).read_text())
    if problems := suite.problems(document["results"]):
        sys.exit("\n".join(problems))
    if busy := suite.busy(document):
        print(busy, file=sys.stderr)
    README.write_text(insert(README.read_text(), table(document)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Writes the tables of README.md: ``python -m benchmarks.readme_table`` that of the models, as ``pyzoo models`` prints
it; with ``benchmarks/results/NAME.json``, which ``pyzoo bench --json FILE`` and ``make gpu`` write, that of the ratios
on a CPU or on a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from . import suite
from .suite import format_ratio

README = suite.ROOT / "README.md"


def table(document: dict) -> str:
    """Geometric means by op and direction, and what they were measured on, as Markdown."""
    lines = ["| operator | direction | cases | geometric mean | from | to |", "|---|---|--:|--:|--:|--:|"]
    for row in suite.summary(document["results"]):
        ratios = " | ".join(format_ratio(row[key]) for key in ("mean", "least", "most"))
        lines.append(f"| {row['op']} | {row['direction']} | {row['cases']} | {ratios} |")
    what = ", ".join(f"{name} {document['versions'][name]}" for name in ("torch", "torchvision"))
    return "\n".join([*lines, "", f"{suite.summary_line(document)}; {what}; commit {document['commit']}."])


def insert(text: str, mark: str, content: str) -> str:
    """``text`` with ``content`` between the two marks."""
    first, last = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{README.name} must have the lines {first} and {last}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        sys.exit(__doc__)
    text = README.read_text()
    if argv:
        document = json.loads(Path(argv[0]).read_text())
        if problems := suite.problems(document["results"]):
            sys.exit("\n".join(problems))
        if busy := suite.busy(document):
            print(busy, file=sys.stderr)
        text = insert(text, "gpu" if "gpu" in document["machine"] else "bench", table(document))
    else:
        from pyzoo.models._registry import table as models_table

        text = insert(text, "models", models_table())
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

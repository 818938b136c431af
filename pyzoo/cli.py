"""The ``pyzoo`` command. ``add_<verb>`` declares a verb's arguments, ``<verb>`` runs it and returns the exit status."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Runs ``pyzoo VERB ...`` and returns the exit status."""
    parser = argparse.ArgumentParser(prog="pyzoo", description="Fast vision kernels for PyTorch and NumPy.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for add in (add_info, add_models, add_bench, add_tune, add_reproduce):
        add(verbs)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except CommandError as error:
        print(f"pyzoo: {error}", file=sys.stderr)
        return 2


class CommandError(Exception):
    """What the user has to change; printed without a traceback."""


def add_info(verbs) -> None:
    verbs.add_parser("info", help="versions, ops and backends, instruction set").set_defaults(run=info)


def info(args: argparse.Namespace) -> int | None:
    from pyzoo import info

    return info.main()


def add_models(verbs) -> None:
    help = "papers, models, parameters, as a Markdown table"
    verbs.add_parser("models", help=help).set_defaults(run=models)


def models(args: argparse.Namespace) -> None:
    from pyzoo.models._registry import table

    print(table())


def add_bench(verbs) -> None:
    parser = verbs.add_parser("bench", help="measure every op against what it replaces", description=bench.__doc__)
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="only these ops (default: all)")
    add("--quick", action="store_true", help="the short set of cases, fewer runs")
    add("--threads", type=positive, metavar="N", help="threads torch and pyzoo may use (default: torch's)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of features and weights (default: float32)")
    add("--cold", action="store_true", help="evict the caches before each run")
    add("-o", "--output", metavar="DIR", default="out/bench", help="folder for page and data (default: %(default)s)")
    add("--json", metavar="FILE", help="file for the raw samples (default: DIR/bench.json)")
    add("--baseline", metavar="FILE", help="an earlier bench.json; exit with 1 if a case got slower")
    add("--render", metavar="FILE", help="measure nothing, print and draw an earlier bench.json")
    add("--list", action="store_true", help="list the cases and stop")
    parser.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> int:
    """Times pyzoo and its peers in turns on the same input, prints a table and writes an HTML page with plots.

    Exits with 1 if the outputs of a case disagree.
    """
    return run_from_tree("benchmarks.console", "bench", args)


def add_tune(verbs) -> None:
    parser = verbs.add_parser("tune", help="measure the Triton kernels' configurations", description=tune.__doc__)
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="only these ops (default: all)")
    add("--quick", action="store_true", help="the short set of shapes")
    add("-o", "--output", metavar="DIR", help="folder for the data (default: pyzoo's own in the user's cache)")
    parser.set_defaults(run=tune)


def tune(args: argparse.Namespace) -> int:
    """Measures the configurations that the Triton kernels offer on this GPU; later calls take the fastest for the
    nearest shape."""
    return run_from_tree("benchmarks.tune", "tune", args)


def add_reproduce(verbs) -> None:
    parser = verbs.add_parser("reproduce", help="run what a paper claims, small", description=reproduce.__doc__)
    add = parser.add_argument
    add("papers", nargs="*", metavar="PAPER", help="names, or 'all'; without any, the papers there are")
    add("--seed", type=int, default=0, metavar="N", help="for all that is random (default: %(default)s)")
    add("-o", "--output", metavar="DIR", default="out/reproduce", help="folder for pictures (default: %(default)s)")
    parser.set_defaults(run=reproduce)


def reproduce(args: argparse.Namespace) -> int:
    """Runs a paper's claims at a size for two cores, prints claimed beside measured and saves a picture.

    Exits with 1 if a claim does not hold.
    """
    from pyzoo.reproduce import papers, run

    known = papers()
    if not args.papers:
        print("\n".join(known))
        return 0
    for paper in args.papers:
        if paper not in [*known, "all"]:
            raise CommandError(f"there is no paper {paper!r} to reproduce; there are {', '.join(known)}")
    wanted = known if "all" in args.papers else args.papers
    return max([run(paper, Path(args.output), args.seed) for paper in wanted])


def run_from_tree(module: str, verb: str, args: argparse.Namespace) -> int:
    root = suite_root()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return getattr(importlib.import_module(module), verb)(args)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("matplotlib", "rich", "torch", "torchvision", "triton"):
            raise CommandError(f"'{error.name}' is missing; install it with: pip install 'pyzoo[bench]'") from error
        raise
    except ImportError as error:  # the compiled core does not load; the message says why
        raise CommandError(str(error)) from error


def suite_root() -> Path:
    """The source tree with the benchmark suite: where pyzoo runs from, or the current directory."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "benchmarks" / "console.py").is_file() and (root / "tests" / "specs").is_dir():
            return root
    raise CommandError(
        "the benchmarks come with the source tree, not with the installed package; run them in a checkout:\n"
        "  git clone https://github.com/pyzoo/pyzoo && cd pyzoo && pip install -e '.[bench]'"
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value

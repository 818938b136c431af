"""``pyzoo bench``: runs the suite with a progress bar, prints the tables, writes the JSON and the HTML page."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pyzoo.cli import CommandError

from . import suite
from .page import render
from .suite import format_ms, format_ratio


def bench(args: Namespace) -> int:
    """Runs the verb; returns the exit status: 1 if a case disagreed, failed, or got worse than the baseline."""
    console = Console() if Console().is_terminal else Console(width=200)  # into a file: never wrap a row
    if args.render:
        document = json.loads(Path(args.render).read_text())
    else:
        specs = suite.load_specs()
        if unknown := sorted(set(args.ops) - set(specs)):
            raise CommandError(f"unknown op {', '.join(unknown)}; there are: {', '.join(specs)}")
        selected = list(suite.cases([specs[name] for name in args.ops or specs], quick=args.quick))
        if args.list:
            console.print(case_table(selected))
            return 0
        if args.device != "cpu" and not torch.cuda.is_available():
            raise CommandError(f"--device {args.device}: torch {torch.__version__} sees no GPU")
        if args.threads:
            torch.set_num_threads(args.threads)
        document = run_with_progress(selected, args)
    results = document["results"]
    console.print(result_table(results))
    console.print(summary_table(results))
    console.print(machine_line(document), style="dim", highlight=False, soft_wrap=True)
    if busy := suite.busy(document):
        console.print(busy, style="yellow", highlight=False)
    write(document, args, console)
    problems = suite.problems(results)
    if args.baseline:
        baseline = json.loads(Path(args.baseline).read_text())["results"]
        problems += [f"slower than the baseline: {line}" for line in suite.regressions(results, baseline)]
    for problem in problems:
        console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if problems else 0


def run_with_progress(selected: list[tuple], args: Namespace) -> dict:
    columns = [
        SpinnerColumn(),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring this machine's ceilings", total=len(selected))
        return suite.run(
            selected,
            quick=args.quick,
            cold=args.cold,
            device=args.device,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            on_case=lambda spec, case: progress.update(task, description=f"{spec.name} {case.id}"),
            on_result=lambda result: progress.advance(task),
        )


def write(document: dict, args: Namespace, console: Console) -> None:
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "index.html", Path(args.json) if args.json else folder / "bench.json"
    page.write_text(render(document), encoding="utf-8")
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"page: {page}\ndata: {data}", highlight=False, soft_wrap=True)


def case_table(selected: list[tuple]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "case", "direction", "size", "quick"):
        table.add_column(name, no_wrap=True)
    for spec, case in selected:
        direction = "step" if case.step else "backward" if case.backward else "forward"
        table.add_row(spec.name, case.id, direction, f"{case.size:g}", "yes" if case.quick else "")
    return table


def result_table(results: list[dict]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("case", no_wrap=True)
    for name in ("pyzoo ms", "peer ms", "ratio", "% of ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    op = None
    for result in results:
        if result["op"] != op:
            op = result["op"]
            table.add_row(f"[bold]{op}[/]")
        if result["status"] != "ok":
            table.add_row(f"  {result['id']}", f"[red]{result['status']}[/]")
            continue
        fraction = result["ceiling_fraction"]
        table.add_row(
            f"  {result['id']}",
            format_ms(result["pyzoo_seconds"]),
            format_ms(result["peer_seconds"]),
            colored(result["ratio"]) if result["ratio"] else "",
            f"{100 * fraction:.0f}" if fraction else "",
        )
    return table


def summary_table(results: list[dict]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="\ngeometric means", title_justify="left")
    for name in ("op", "direction"):
        table.add_column(name, no_wrap=True)
    for name in ("cases", "ratio", "range"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in suite.summary(results):
        spread = f"{format_ratio(row['least'])} to {format_ratio(row['most'])}"
        table.add_row(row["op"], row["direction"], str(row["cases"]), colored(row["mean"]), spread)
    return table


def colored(ratio: float) -> str:
    return f"[{'green' if ratio >= 1 else 'red'}]{format_ratio(ratio)}[/]"


def machine_line(document: dict) -> str:
    copy, gemm = document["ceilings"]["copy_bytes_per_second"], document["ceilings"]["gemm_flops_per_second"]
    return (
        f"\n{suite.summary_line(document)}, torch {document['versions']['torch']}; "
        f"copy {copy / 1e9:.1f} GB/s, gemm {gemm / 1e9:.0f} GFLOP/s"
    )

"""The HTML page: one file, no external resource, plots as inline SVG. Made from the JSON document alone."""

from __future__ import annotations

import io
import math
import statistics
from html import escape

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .measure import geometric_mean
from .suite import busy, format_ms, format_ratio, problems, summary, summary_line

FORWARD, BACKWARD, LOSS, PEER, FLOOR, INK = "#2563eb", "#0d9488", "#dc2626", "#9ca3af", "#d97706", "#374151"

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's own sans-serif
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#d1d5db",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "grid.color": "#eef0f3",
    "axes.axisbelow": True,
}

METHOD = """
pyzoo and the peer take turns in one process on the same input; the ratio is the median of the ratios of
neighbouring runs, and a time is the median of its runs. A case is timed only after its outputs agreed with the
peer's: indices exactly, values and gradients within a tolerance. The floor is the least memory traffic or
arithmetic of the case divided by what this machine reached in the same session when it copied a large buffer or
multiplied matrices with torch; input that stays in the caches can go above 100 %. Backward cases time the backward
pass alone. Memory is the most that torch's allocator had given out at a time during a step, besides the results.
"""

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #1f2937; font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; margin: 0; letter-spacing: -.02em; }
h2 { font-size: 19px; margin: 44px 0 12px; }
p { margin: 6px 0; } .dim { color: #6b7280; }
.cards { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 24px; }
.card, .panel { background: #fff; border: 1px solid #e5e7eb; border-radius: 10px; }
.card { padding: 16px 20px; flex: 1 1 190px; }
.card b { display: block; font-size: 32px; line-height: 1.2; letter-spacing: -.02em; color: #2563eb; }
.card b.loss { color: #dc2626; } .card small { color: #6b7280; display: block; }
.panel { padding: 16px; margin-bottom: 14px; overflow-x: auto; }
.panel svg { display: block; max-width: 100%; height: auto; }
.problems { border-color: #fca5a5; background: #fef2f2; } .problems li { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; }
dt { color: #6b7280; } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: #6b7280; font-weight: 600; border-bottom: 1px solid #e5e7eb; }
th, td { padding: 5px 8px; }
td.n, th.n { white-space: nowrap; } tbody tr:hover { background: #f9fafb; }
td.n, th.n { text-align: right; } tr.op td { font-weight: 700; padding-top: 16px; border-bottom: 1px solid #e5e7eb; }
.win { color: #047857; font-weight: 600; } .loss { color: #dc2626; font-weight: 600; }
"""


def render(document: dict) -> str:
    """The page for a document that :func:`benchmarks.suite.run` returned."""
    results = document["results"]
    timed = [result for result in results if result["ratio"]]
    with matplotlib.rc_context(STYLE):
        sections = [
            _header(document),
            _cards(summary(results)),
            _problems(problems(results)),
            "<h2>Speed-up per case</h2>",
            *(_panel(_bars(of_op), f"Speed-up of {op} per case") for op, of_op in _by_op(timed).items()),
        ]
        growth = {op: _growth(of_op) for op, of_op in _by_op(timed).items()}
        if any(growth.values()):
            sections.append("<h2>Time against size</h2>")
            sections += [_panel(figure, f"Time of {op} against size") for op, figure in growth.items() if figure]
        if any(result.get("pyzoo_bytes") for result in results):
            sections += ["<h2>Memory against size</h2>", _panel(_memory(results), "Peak memory against size")]
    sections += ["<h2>All cases</h2>", _table(results), "<h2>Machine and method</h2>", _machine(document)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>pyzoo benchmark</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _by_op(results: list[dict]) -> dict[str, list[dict]]:
    ops: dict[str, list[dict]] = {}
    for result in results:
        ops.setdefault(result["op"], []).append(result)
    return ops


def _peers(results: list[dict]) -> str:
    return ", ".join(dict.fromkeys(result["peer_name"] for result in results if result["peer_name"]))


def _header(document: dict) -> str:
    settings = document["settings"]
    facts = [
        document["finished"].replace("T", " ").replace("+00:00", " UTC"),
        f"pyzoo {document['versions']['pyzoo']}" + (f" ({document['commit']})" if document["commit"] else ""),
        summary_line(document),
    ]
    set_name = "quick set" if settings["quick"] else "full set"
    title = f'<h1>pyzoo benchmark</h1>\n<p class="dim">{escape(" · ".join([*facts, set_name]))}</p>'
    return title + (f'\n<p class="loss">{escape(busy(document))}</p>' if busy(document) else "")


def _cards(rows: list[dict]) -> str:
    cards = []
    for row in rows:
        if row["direction"] != "all":
            continue
        parts = [f"{r['direction']} {format_ratio(r['mean'])}" for r in rows if r["op"] == row["op"] and r is not row]
        title = "all ops" if row["op"] == "all" else row["op"]
        spread = f"{row['cases']} cases, {format_ratio(row['least'])} to {format_ratio(row['most'])}"
        cards.append(
            f'<div class="card">{escape(title)}<b{_loss_class(row["mean"])}>{format_ratio(row["mean"])}</b>'
            f"<small>{escape(', '.join(parts)) or 'geometric mean'}</small><small>{spread}</small></div>"
        )
    explanation = "Geometric means of peer time / pyzoo time: above 1×, pyzoo is faster."
    return f'<div class="cards">{"".join(cards)}</div>\n<p class="dim">{explanation}</p>'


def _loss_class(ratio: float) -> str:
    return ' class="loss"' if ratio < 1 else ""


def _problems(lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<h2>Cases without a result</h2>\n<div class="panel problems"><ul>{items}</ul></div>'


def _panel(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    # Ids differ between the plots of one page but not between two runs.
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return f'<div class="panel">{svg}</div>'


def _bars(results: list[dict]) -> Figure:
    """Bars to the right of 1x are wins, red bars to the left of it are losses."""
    results = sorted(results, key=lambda result: result["ratio"])
    ratios = [result["ratio"] for result in results]
    colors = [LOSS if r["ratio"] < 1 else BACKWARD if r["direction"] == "backward" else FORWARD for r in results]
    figure = Figure(figsize=(11, 0.75 + 0.23 * len(results)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(results)), [ratio - 1 for ratio in ratios], left=1, height=0.68, color=colors)
    for y, ratio in enumerate(ratios):
        side, shift = ("left", 4) if ratio >= 1 else ("right", -4)
        axes.annotate(
            format_ratio(ratio), (ratio, y), (shift, 0), textcoords="offset points", ha=side, va="center", fontsize=8
        )
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, min(ratios) * 0.6), max(2.0, max(ratios) * 1.5))
    axes.set_ylim(-0.6, len(results) - 0.4)
    axes.set_yticks(range(len(results)), [result["id"] for result in results])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_title(f"{results[0]['op']}, times faster than {_peers(results)}")
    keys = [("forward", FORWARD), ("backward", BACKWARD), ("slower than the peer", LOSS)]
    keys = [(name, color) for name, color in keys if color in colors]
    if len(keys) > 1:
        patches = [Patch(color=color, label=name) for name, color in keys]
        axes.legend(handles=patches, loc="lower right", frameon=False)
    return figure


def _growth(results: list[dict]) -> Figure | None:
    """Time against size, log-log, one plot for each group that has more than one size."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["group"], result["direction"]), []).append(result)
    groups = {key: group for key, group in groups.items() if len({result["size"] for result in group}) > 1}
    if not groups:
        return None
    figure, grid = _grid(len(groups))
    figure.suptitle(results[0]["op"], x=0.01, ha="left", weight="bold")
    for axes, ((name, direction), group) in zip(grid, groups.items(), strict=False):
        _line(axes, group, "floor_seconds", "this machine's floor", FLOOR, ":", None)
        _line(axes, group, "peer_seconds", group[0]["peer_name"], PEER, "-", "s")
        _line(axes, group, "pyzoo_seconds", "pyzoo", BACKWARD if direction == "backward" else FORWARD, "-", "o")
        axes.set(xscale="log", yscale="log", xlabel="size", ylabel="ms")
        axes.set_title(name if direction in name or direction == "forward" else f"{name}, {direction}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(numticks=7))
            axis.set_major_formatter(FuncFormatter(_plain))
            axis.set_minor_locator(NullLocator())
        axes.grid()
        axes.legend(frameon=False, fontsize=7.5, loc="upper left")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
    return figure


def _memory(results: list[dict]) -> Figure:
    """Peak memory of a training step against size, pyzoo and all peers, one plot for each group with several sizes."""
    groups: dict[str, dict[str, dict[float, float]]] = {}
    for result in results:
        for name, used in (("pyzoo", result.get("pyzoo_bytes")), (result["peer_name"], result.get("peer_bytes"))):
            if used:
                groups.setdefault(result["group"], {}).setdefault(name, {})[result["size"]] = used / 2**20
    groups = {group: lines for group, lines in groups.items() if len(lines["pyzoo"]) > 1} or groups
    figure, grid = _grid(len(groups))
    for axes, (group, lines) in zip(grid, groups.items(), strict=False):
        for color, (name, sizes) in zip((FORWARD, PEER, FLOOR, BACKWARD, LOSS), lines.items(), strict=False):
            x = sorted(sizes)
            axes.plot(x, [sizes[n] for n in x], "o-", color=color, markersize=4, linewidth=1.6, label=name)
        axes.set(title=group, xlabel="size", ylabel="MiB", xlim=(0, None), ylim=(0, None))
        axes.grid()
        axes.legend(frameon=False, fontsize=7.5, loc="upper left")
    return figure


def _grid(plots: int) -> tuple[Figure, list]:
    """A figure with room for so many plots, and the plots."""
    columns = 3
    rows = -(-plots // columns)
    figure = Figure(figsize=(11, 2.9 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[plots:]:
        axes.set_visible(False)
    return figure, grid


def _line(axes, group: list[dict], key: str, label: str, color: str, style: str, marker: str | None) -> None:
    times: dict[float, list[float]] = {}
    for result in group:
        if result[key]:
            times.setdefault(result["size"], []).append(result[key] * 1e3)
    if not times:
        return
    sizes = sorted(times)
    means = [geometric_mean(times[size]) for size in sizes]
    if marker and len(sizes) > 2 and sizes[0] > 0:
        slope = statistics.linear_regression([math.log(n) for n in sizes], [math.log(t) for t in means]).slope
        label += f", grows as size^{slope:.1f}"
    axes.plot(sizes, means, style, color=color, marker=marker, markersize=4, linewidth=1.6, label=label)


def _plain(value: float, _position: int) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def _table(results: list[dict]) -> str:
    names = ("pyzoo ms", "peer ms", "ratio", "range", "floor ms", "% of ceiling", "pairs")
    head = "<th>case</th>" + "".join(f'<th class="n">{name}</th>' for name in names)
    body = []
    for op, of_op in _by_op(results).items():
        title = f"{op} against {_peers(of_op)}" if _peers(of_op) else op
        body.append(f'<tr class="op"><td colspan="{len(names) + 1}">{escape(title)}</td></tr>')
        body += [_row(result) for result in of_op]
    return f'<div class="panel"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _row(result: dict) -> str:
    case = f"<td>{escape(result['id'])}</td>"
    if result["status"] != "ok":
        return f'<tr>{case}<td colspan="7" class="loss">{result["status"]}</td></tr>'
    ratio, spread = "", ""
    if result["ratio"]:
        pairs = [peer / ours for ours, peer in zip(result["pyzoo_samples"], result["peer_samples"], strict=True)]
        ratio = f'<span class="{"loss" if result["ratio"] < 1 else "win"}">{format_ratio(result["ratio"])}</span>'
        spread = f"{format_ratio(min(pairs))} to {format_ratio(max(pairs))}"
    fraction = result["ceiling_fraction"]
    cells = [
        escape(format_ms(result["pyzoo_seconds"])),
        escape(format_ms(result["peer_seconds"])),
        ratio,
        spread,
        escape(format_ms(result["floor_seconds"])),
        f"{100 * fraction:.0f}" if fraction else "",
        str(len(result["pyzoo_samples"])),
    ]
    return f"<tr>{case}" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>"


def _machine(document: dict) -> str:
    ceilings, settings = document["ceilings"], document["settings"]
    facts = {
        **document["machine"],
        **document["versions"],
        "commit": document["commit"] or "not run from a checkout",
        "threads": settings["threads"],
        "backend": settings["backend"] or "the default",
        "caches": settings["cache"],
        "load before the run": document["load_before"],
        "copy bandwidth": f"{ceilings['copy_bytes_per_second'] / 1e9:.1f} GB/s (bytes read plus bytes written)",
        "matrix product": f"{ceilings['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s ({settings['dtype']})",
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f'<div class="panel"><dl>{rows}</dl></div>\n<p class="dim">{METHOD}</p>'

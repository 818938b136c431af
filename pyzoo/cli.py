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
    for add in (add_info, add_models, add_bench, add_tune, add_reproduce, add_style):
        add(verbs)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except CommandError as error:
        print(f"pyzoo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyzoo: interrupted", file=sys.stderr)
        return 130


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


def add_style(verbs) -> None:
    parser = verbs.add_parser("style", help="paint a picture in the style of another", description=style.__doc__)
    add = parser.add_argument
    add("content", metavar="CONTENT", help="the picture to paint")
    add("style", metavar="STYLE", help="the picture that shows how")
    add("-o", "--output", metavar="OUT", required=True, help="file for the result; its ending says of what kind")
    add(
        "--weights", metavar="FILE", help="torchvision's VGG-19, or one with layers named as in Caffe (default: random)"
    )
    add("--size", type=positive, default=512, metavar="N", help="longest side; larger pictures are scaled down to it")
    add("--steps", type=positive, default=300, metavar="N", help="how long to search (default: %(default)s)")
    add("--optimizer", choices=("lbfgs", "adam"), default="lbfgs", help="adam needs less memory (default: %(default)s)")
    add("--init", default="content", metavar="START", help="content, style, noise or a file (default: %(default)s)")
    add("--content-layers", type=layer_weights, metavar="W", help="weights by layer, as conv4_2=0.05")
    add("--style-layers", type=layer_weights, metavar="W", help="the same, as conv1_1=0.5,conv2_1=0.5")
    add(
        "--color",
        choices=("match", "luminance"),
        help="keep the colors of CONTENT: style recolored, or lightness alone",
    )
    add("--tile", type=positive, metavar="N", help="bounds memory: the net sees N x N pixels at once")
    add("--seed", type=int, default=0, metavar="N", help="of noise and of random filters (default: %(default)s)")
    parser.set_defaults(run=style)


def style(args: argparse.Namespace) -> int:
    """Neural style transfer. Large pictures take long: first make a small one, then give it as --init to a larger run
    with --tile. Ctrl-C keeps what there is so far, to go on from with --init."""
    try:
        return paint(args)
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError, FloatingPointError) as error:
        raise CommandError(str(error).removeprefix("style_transfer: ")) from error


def paint(args: argparse.Namespace) -> int:
    import torch

    from pyzoo._extras import need
    from pyzoo.data.picture import check_writable, read_picture, write_picture
    from pyzoo.models.neural_style import RANDOM, style_net, style_transfer

    output = Path(args.output)
    check_writable(output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content, style = (read_picture(path, args.size).to(device) for path in (args.content, args.style))
    options = {} if args.weights else dict(RANDOM)
    given = {"content_layers": args.content_layers, "style_layers": args.style_layers}
    options |= {name: value for name, value in given.items() if value is not None}
    if args.init not in ("content", "style", "noise"):
        args.init = read_picture(args.init).to(device)
    net = style_net(args.weights, [content, style], seed=args.seed).to(device)
    with need("tqdm.auto", "pyzoo style").tqdm(total=args.steps, unit="step") as bar:
        painted, stopped = None, False

        def show(step, losses, image):
            nonlocal painted
            painted = image
            bar.set_postfix(content=f"{losses['content']:.4g}", style=f"{losses['style']:.4g}", refresh=False)
            bar.update()

        options |= {name: getattr(args, name) for name in ("steps", "optimizer", "init", "color", "tile", "seed")}
        try:
            painted, _ = style_transfer(content, style, net, callback=show, **options)
        except KeyboardInterrupt:
            if painted is None:  # what OUT may hold already is worth more
                raise
            stopped = True
    write_picture(painted, output)
    print(f"{output}: {painted.shape[2]} x {painted.shape[1]}{', not finished' if stopped else ''}")
    return 130 if stopped else 0


def layer_weights(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",")]
    return {layer.strip(): float(weight) if weight or equals else 1.0 for layer, equals, weight in pairs}


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

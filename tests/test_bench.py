"""The benchmark suite on ops made up here: not what it says about the real ones, only that it says it rightly."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import gpu, measure, page, suite
from pyzoo import cli
from tests.specs.spec import BenchCase, OpSpec

BUDGET = measure.Budget(seconds=0.1, max_pairs=4)
CEILINGS = measure.Ceilings(copy_bytes_per_second=1e10, gemm_flops_per_second=1e11)


def slow(x):
    time.sleep(0.01)
    return 2 * x


def case(name="one", backward=False, size=4, **kwargs) -> BenchCase:
    return BenchCase(name, "a group", lambda: ((torch.ones(4),), {}), backward, size, floor_bytes=1e4, **kwargs)


def double(x):
    return 2 * x


def spec(op=double, peer=slow, cases=None, **kwargs) -> OpSpec:
    bench = lambda: iter(cases or [case()])  # noqa: E731
    return OpSpec("double", op, double, None, None, bench, peer, "a peer", differentiable=(0,), **kwargs)


def run_one(spec, case=None):
    return measure.run_case(spec, case or next(spec.bench()), BUDGET, CEILINGS)


def test_a_slower_peer_gives_a_ratio_above_one():
    faster, slower = run_one(spec()), run_one(spec(op=slow, peer=double))
    assert faster.status == slower.status == "ok"
    assert faster.ratio > 1 > slower.ratio
    assert faster.peer_seconds >= 0.01
    assert len(faster.pyzoo_samples) == len(faster.peer_samples) >= BUDGET.min_pairs


def test_the_times_of_a_peer_that_does_a_share_of_the_work_are_divided_by_it():
    whole, share = run_one(spec()), run_one(spec(), case(peer_share=0.01))
    assert share.peer_seconds >= 1
    assert share.ratio > 20 * whole.ratio


def test_the_ratio_is_the_median_of_neighbouring_pairs():
    assert measure.paired_ratio([1.0, 2.0, 1.0], [3.0, 4.0, 500.0]) == 3.0


def test_pyzoo_and_peer_alternate():
    order = []
    calls = [lambda: order.append("A"), lambda: order.append("B")]
    samples = measure.interleave(calls, BUDGET, before_sample=lambda: None)
    assert "".join(order).endswith("B" + "AB" * len(samples[0]))


def test_slow_calls_get_fewer_pairs_and_fast_ones_are_repeated():
    rounds, loops = measure.plan([lambda: time.sleep(0.06)], BUDGET)
    assert (rounds, loops) == (BUDGET.min_pairs, [1])
    rounds, (loop,) = measure.plan([lambda: None], BUDGET)
    assert rounds == BUDGET.max_pairs
    assert loop > 100


def test_a_slow_first_call_does_not_shorten_the_samples(monkeypatch):
    seconds = iter([9e-4])
    monkeypatch.setattr(measure, "seconds_per_call", lambda call, loops: next(seconds, 1e-5))
    loop, duration = measure.sample_size(lambda: None, 1e-3)
    assert loop * 1e-5 == duration >= 1e-3


@pytest.mark.parametrize("backward", [False, True])
def test_an_op_that_disagrees_is_not_timed(backward):
    result = run_one(spec(op=lambda x: 2.01 * x), case(backward=backward))
    assert (result.status, result.ratio, result.pyzoo_samples) == ("disagrees", None, [])
    assert "4 of 4 values differ, the first at (0,)" in result.note


def test_an_op_that_raises_is_reported():
    def broken(x):
        raise RuntimeError("no such kernel")

    assert run_one(spec(op=broken)).note == "RuntimeError: no such kernel"


def test_backward_times_the_backward_pass_alone():
    result = run_one(spec(), case(backward=True))
    assert result.status == "ok"
    assert result.direction == "backward"
    assert result.peer_seconds < 0.01


def test_peak_memory_of_a_step():
    def hoarding(x):
        return [x + i for i in range(8)][-1]  # seven at the end, besides the result

    def frugal(x):
        return x + 1 + 2

    x = torch.ones(2**18)
    assert measure.peak_bytes(lambda: hoarding(x)) == pytest.approx(7 * 2**20, rel=1e-3)
    assert measure.peak_bytes(lambda: frugal(x)) == pytest.approx(2**20, rel=1e-3)
    result = run_one(spec(op=frugal, peer=lambda x: slow(x) - x + 1 + 2), case(step=True))
    assert (result.direction, result.status) == ("step", "ok")
    assert result.peer_bytes > result.pyzoo_bytes > 0


def test_without_a_peer_the_reference_decides():
    result = run_one(spec(peer=None))
    assert (result.status, result.ratio, result.peer_seconds) == ("ok", None, None)
    assert run_one(spec(op=slow, peer=None, exact=True)).status == "ok"
    assert run_one(spec(op=lambda x: 3 * x, peer=None)).status == "disagrees"


def test_agreement_is_exact_for_indices_and_relative_for_values():
    values, close = torch.tensor([1e4, 1.0, torch.nan]), torch.tensor([1e4, 1.0 + 1e-3, torch.nan])
    measure.assert_agrees([close], [values], spec())
    indices = torch.tensor([0, 1, 2])
    measure.assert_agrees([indices], [indices], spec(exact=True))
    for wrong in (indices.flip(0), indices[:2]):
        with pytest.raises(measure.Disagreement):
            measure.assert_agrees([wrong], [indices], spec(exact=True))
    with pytest.raises(measure.Disagreement, match="1 outputs, expected 2"):
        measure.assert_agrees([values], [values, values], spec())


def test_gradients_flow_into_lists_and_dicts():
    def total(features):
        return features["a"].square() + features["b"]

    features = {"a": torch.ones(3), "b": torch.ones(3), "index": torch.arange(3)}
    grads = measure.make_call(total, (features,), {}, backward=True, differentiable=(0,))()
    torch.testing.assert_close(grads[0], 2 * grads[1])


def test_fraction_of_the_ceiling():
    assert CEILINGS.floor_seconds(replace(case(), floor_bytes=1e7, floor_flops=1e9)) == pytest.approx(0.01)
    result = run_one(spec(op=slow))
    assert result.ceiling_fraction == pytest.approx(1e4 / 1e10 / result.pyzoo_seconds)


def result(op, name, direction, ratio, **kwargs) -> dict:
    samples = {"pyzoo_samples": [1e-3], "peer_samples": [ratio * 1e-3]} if ratio else {}
    times = {"pyzoo_seconds": 1e-3, "peer_seconds": ratio * 1e-3} if ratio else {}
    kwargs = {"ratio": ratio, **samples, **times, **kwargs}
    return measure.Result(op, name, "group", direction, ratio or 1, "peer", **kwargs).to_dict()


RESULTS = [
    result("nms", "dense <5000>", "forward", 100.0),
    result("roi_align", "nchw", "forward", 4.0),
    result("roi_align", "nhwc", "forward", 16.0),
    result("roi_align", "grad", "backward", 0.5),
    result("roi_align", "wrong", "forward", None, status="disagrees", note="1 of 4 values differ"),
]


def test_geometric_means():
    means = {(row["op"], row["direction"]): (row["mean"], row["cases"]) for row in suite.summary(RESULTS)}
    assert means == {
        ("nms", "all"): (pytest.approx(100), 1),
        ("roi_align", "all"): (pytest.approx(32 ** (1 / 3)), 3),
        ("roi_align", "forward"): (pytest.approx(8), 2),
        ("roi_align", "backward"): (pytest.approx(0.5), 1),
        ("all", "all"): (pytest.approx(3200**0.25), 4),
    }


def test_problems_of_one_reason_are_one_sentence():
    failed = [result("nms", name, "forward", None, status="failed", note="no kernel") for name in ("small", "large")]
    assert suite.problems([*RESULTS, *failed]) == [
        "roi_align disagrees: 1 of 4 values differ (in: wrong)",
        "nms failed: no kernel (in: small; large)",
    ]


@dataclass
class Network:
    weights: list[torch.Tensor]
    size: int


def test_arguments_move_to_a_device_and_dtype():
    network, index = Network([torch.ones(2, 3)], 4), torch.arange(3)
    args, kwargs = measure.move(((network, index), {"module": torch.nn.Linear(2, 2)}), "meta", torch.bfloat16)
    assert args[0].size == 4
    assert (args[0].weights[0].device.type, args[0].weights[0].dtype) == ("meta", torch.bfloat16)
    assert (args[1].device.type, args[1].dtype) == ("meta", torch.int64)
    assert (kwargs["module"].weight.device.type, kwargs["module"].weight.dtype) == ("meta", torch.bfloat16)


def test_a_dtype_is_that_of_what_has_a_gradient():
    seen = []
    op = lambda x, boxes: seen.append((x.dtype, boxes.dtype)) or x + 0  # noqa: E731
    two = BenchCase("two", "a group", lambda: ((torch.ones(4), torch.ones(4)), {}), floor_bytes=1e4)
    measure.run_case(replace(spec(), op=op, peer=op), two, BUDGET, CEILINGS, dtype=torch.bfloat16)
    assert set(seen) == {(torch.bfloat16, torch.float32)}


def test_regressions_name_the_case():
    before = [result("nms", "dense <5000>", "forward", 130.0), result("roi_align", "nchw", "forward", 4.4)]
    assert suite.regressions(RESULTS, before) == ["nms dense <5000>: 100.00x, was 130.00x"]


@pytest.fixture
def document():
    return {
        "schema_version": suite.SCHEMA_VERSION,
        "machine": {"cpu": "a <fast> CPU", "isa": "avx2"},
        "versions": {"pyzoo": "1.2.3", "torch": torch.__version__},
        "commit": "0123abc",
        "finished": "2026-01-01T00:00:00+00:00",
        "settings": {"quick": True, "cache": "warm", "threads": 2, "dtype": "float32", "backend": None},
        "load_before": 0.1,
        "ceilings": vars(CEILINGS),
        "results": RESULTS,
    }


def test_the_page_has_every_case_and_needs_nothing_else(document):
    html = page.render(document)
    cases = ("dense &lt;5000&gt;", "nchw", "nhwc", "grad", "wrong", "1 of 4 values differ", "100×")
    for text in (*cases, "a &lt;fast&gt; CPU", "0123abc"):
        assert text in html
    assert html.count('<svg role="img"') == 3  # speed-up of two ops, growth of one
    for outside in ("<script", "<link", "<img", "src=", 'href="http', "url(http"):
        assert outside not in html
    assert html == page.render(document)


def test_the_page_shows_memory_where_it_was_measured(document):
    sizes = [
        (n, result("stack", f"{n} blocks", "step", n, pyzoo_bytes=2**20, peer_bytes=int(n) << 20)) for n in (2.0, 4.0)
    ]
    html = page.render({**document, "results": [r for _, r in sizes]})
    assert "Memory against size" in html
    assert html.count('<svg role="img"') == 3
    assert "Memory against size" not in page.render(document)


def test_a_page_without_results_still_renders(document):
    assert "disagrees" in page.render({**document, "results": RESULTS[-1:]})
    assert page.render({**document, "results": []})


@pytest.fixture
def two_ops(monkeypatch):
    good = spec(cases=[case(quick=True), case("big", size=8), case("grad", backward=True)])
    bad = replace(spec(op=lambda x: x, cases=[case(quick=True)]), name="wrong")
    monkeypatch.setattr(suite, "load_specs", lambda: {"double": good, "wrong": bad})
    monkeypatch.setattr(measure, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(measure, "QUICK", BUDGET)
    monkeypatch.setattr(measure, "FULL", BUDGET)


def test_bench_writes_page_and_samples(two_ops, tmp_path, capsys):
    assert cli.main(["bench", "double", "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "geometric means" in printed
    data = json.loads((tmp_path / "bench.json").read_text())
    assert [r["id"] for r in data["results"]] == ["one", "big", "grad"]
    assert all(len(r["pyzoo_samples"]) >= BUDGET.min_pairs for r in data["results"])
    assert data["settings"]["threads"] == torch.get_num_threads()
    assert {"machine", "versions", "commit", "ceilings"} <= set(data)
    assert "double" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_disagreement_sets_the_exit_status(two_ops, tmp_path, capsys):
    assert cli.main(["bench", "--quick", "-o", str(tmp_path), "--json", str(tmp_path / "data" / "raw.json")]) == 1
    assert "wrong disagrees: 4 of 4 values differ" in capsys.readouterr().out
    raw = tmp_path / "data" / "raw.json"
    assert len(json.loads(raw.read_text())["results"]) == 2
    assert cli.main(["bench", "--render", str(raw), "-o", str(tmp_path / "again")]) == 1
    assert (tmp_path / "again" / "index.html").exists()


def test_what_make_gpu_measures(two_ops, tmp_path, capsys):
    assert [spec.name for spec, _ in gpu.cases("cuda", time.monotonic() + 60)] == ["double", "wrong"]
    assert not list(gpu.cases("cuda", time.monotonic()))
    raw = tmp_path / "data" / "raw.json"
    assert gpu.run("cpu", "float32", gpu.cases("cpu", time.monotonic() + 60), raw, "cpu") == 1
    printed = capsys.readouterr().out
    assert "double one: " in printed
    assert "wrong one: disagrees: 4 of 4 values differ" in printed
    assert "| double | all | 1 |" in printed
    assert [r["op"] for r in json.loads(raw.read_text())["results"]] == ["double", "wrong"]


def test_make_gpu_needs_no_extra():
    code = "import sys; sys.modules.update(rich=None, matplotlib=None); import benchmarks.gpu"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=suite.ROOT)


def test_list_shows_the_cases(two_ops, capsys):
    assert cli.main(["bench", "--list", "double"]) == 0
    assert "backward" in capsys.readouterr().out


def test_an_unknown_op_is_named_with_those_there_are(two_ops, capsys):
    assert cli.main(["bench", "nmz"]) == 2
    assert "unknown op nmz; there are: double, wrong" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(two_ops, capsys):
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_bad_arguments_are_refused(capsys):
    for arguments in (["bench", "--threads", "0"], ["bench", "--threads", "two"], ["frobnicate"], []):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    for module in ("benchmarks.console", "benchmarks.page", "matplotlib"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["bench", "--list"]) == 2
    assert "pip install 'pyzoo[bench]'" in capsys.readouterr().err


def test_outside_a_checkout_bench_says_where_the_suite_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "pyzoo" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 2
    assert "git clone" in capsys.readouterr().err


def test_the_command_starts_without_torch():
    code = (
        "import sys; from pyzoo import cli\n"
        "try: cli.main(['bench', '--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_spec_has_benchmark_cases():
    for name, op_spec in suite.load_specs().items():
        names = [case.id for case in op_spec.bench()]
        assert names, f"{name} has no benchmark case"
        assert len(set(names)) == len(names), f"{name} has two benchmark cases of one name"
        assert any(case.quick for case in op_spec.bench()), f"{name} has no case in the quick set"

"""Two pytest-benchmark entries for each case, pyzoo and its peer, and beside pyzoo's the paired measurement.

``pytest benchmarks --benchmark-only [--quick] [-k OP]``. pytest-benchmark times one side after the other; what we quote
stands in ``extra_info`` of pyzoo's entry: the ratio of the interleaved runs and the fraction of the machine's ceiling.
"""

from types import SimpleNamespace

import pytest

from benchmarks import measure


@pytest.fixture(scope="session")
def ceilings():
    return measure.measure_ceilings()


@pytest.fixture(scope="module")
def prepared(request):
    """The calls of one case, built and checked once for both entries; a case that disagrees fails here."""
    spec, case = request.param
    ours, peer = measure.prepare(spec, case)
    budget = measure.QUICK if request.config.getoption("--quick") else measure.FULL
    return SimpleNamespace(spec=spec, case=case, ours=ours, peer=peer, budget=budget)


def run(benchmark, prepared, call):
    rounds, (loops,) = measure.plan([call], prepared.budget)
    benchmark.group = f"{prepared.spec.name} {prepared.case.id}"
    benchmark.pedantic(call, rounds=rounds, iterations=loops)


def test_pyzoo(benchmark, prepared, ceilings):
    run(benchmark, prepared, prepared.ours)
    if prepared.peer:
        ours, peer = measure.interleave([prepared.ours, prepared.peer], prepared.budget)
        peer = [seconds / prepared.case.peer_share for seconds in peer]
        benchmark.extra_info.update(ratio=measure.paired_ratio(ours, peer), pyzoo_samples=ours, peer_samples=peer)
    if floor := ceilings.floor_seconds(prepared.case):
        benchmark.extra_info["ceiling_fraction"] = floor / benchmark.stats.stats.median


def test_peer(benchmark, prepared):
    if not prepared.peer:
        pytest.skip("no peer")
    run(benchmark, prepared, prepared.peer)

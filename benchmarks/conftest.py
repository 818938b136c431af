"""Options of ``pytest benchmarks --benchmark-only``."""

import torch

from benchmarks import suite


def pytest_addoption(parser):
    group = parser.getgroup("pyzoo")
    group.addoption("--quick", action="store_true", help="only the cases of the quick set, fewer runs")
    group.addoption("--threads", type=int, metavar="N", help="threads torch and pyzoo may use")


def pytest_configure(config):
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc):
    if "prepared" in metafunc.fixturenames:
        pairs = list(suite.cases(suite.load_specs().values(), quick=metafunc.config.getoption("--quick")))
        ids = [f"{spec.name}-{case.id}" for spec, case in pairs]
        metafunc.parametrize("prepared", pairs, ids=ids, indirect=True, scope="module")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(suite.machine(), versions=suite.versions(), threads=torch.get_num_threads())

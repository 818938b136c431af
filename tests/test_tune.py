"""Which configuration a Triton kernel gets, and how the fastest is found; on kernels made up here."""

from __future__ import annotations

import json
import time

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from benchmarks import tune
from pyzoo import cli
from pyzoo.kernels import _configs

CPU = torch.device("cpu")


def _kernel(): ...


def configs(channels, pixels):
    for size in (16, 32, 64):
        yield {"BLOCK": min(size, channels)}


def pick(channels=64, pixels=100, dtype=torch.float32):
    return _configs.pick(_kernel, configs, CPU, dtype, channels=channels, pixels=pixels)["BLOCK"]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Writes the configurations that were measured."""

    def write(folder, *entries):
        (tmp_path / folder).mkdir(exist_ok=True)
        data = [dict(zip(("dtype", "shape", "config"), entry, strict=True)) for entry in entries]
        (tmp_path / folder / "cpu.json").write_text(json.dumps({"_kernel": data}))
        _configs.measured.cache_clear()

    monkeypatch.setattr(_configs, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(_configs, "INSTALLED", tmp_path / "installed")
    _configs.measured.cache_clear()
    yield write
    _configs.measured.cache_clear()


def entry(channels, pixels, block, dtype="float32"):
    return dtype, {"channels": channels, "pixels": pixels}, {"BLOCK": block}


def test_the_first_is_the_default(measured):
    assert pick() == 16
    measured("installed", entry(64, 100, 32, "float16"))
    assert pick() == 16
    assert pick(dtype=torch.float16) == 32


def test_the_nearest_shape_decides(measured):
    measured("installed", entry(64, 100, 32), entry(64, 10000, 64))
    assert pick(pixels=150) == 32
    assert pick(pixels=5000) == 64
    assert pick(pixels=10**9) == 64


def test_what_is_no_candidate_is_not_taken(measured):
    measured("installed", entry(64, 100, 48), entry(64, 10000, 64))
    assert pick() == 64
    assert pick(channels=8) == 8


def test_the_cache_of_the_user_comes_first(measured):
    measured("installed", entry(64, 100, 32))
    measured("cache", entry(64, 100, 64))
    assert pick() == 64


def test_tuning_finds_the_fastest_for_each_shape(measured):
    def call():
        for pixels in (100, 200):
            time.sleep({16: 0.004, 32: 0.001, 64: 0.003}[pick(pixels=pixels)])
        if _configs.pick(test_the_first_is_the_default, lambda: [{"N": 1}, {"N": 2}], CPU, torch.float16)["N"] == 2:
            raise OutOfResources(1 << 20, 1 << 16, "shared memory")

    found = tune.fastest(call)
    assert [(e["dtype"], e["shape"]["pixels"], e["config"]) for e in found["_kernel"]] == [
        ("float32", 100, {"BLOCK": 32}),
        ("float32", 200, {"BLOCK": 32}),
    ]
    assert [e["config"] for e in found["test_the_first_is_the_default"]] == [{"N": 1}]
    assert pick() == 16  # only while it measures


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu(capsys):
    assert cli.main(["tune"]) == 2
    assert "sees no GPU" in capsys.readouterr().err

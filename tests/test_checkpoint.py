"""Weights in files: what fits, what does not, and files that are damaged or hostile."""

from __future__ import annotations

import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pyzoo.checkpoint import load_weights, save_weights


def make(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))


def assert_same(a: nn.Module, b: nn.Module):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------ what fits


def test_save_and_load(tmp_path):
    model, other = make().to(memory_format=torch.channels_last), make(1)
    save_weights(model, tmp_path / "a.safetensors")
    save_weights(model, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert load_weights(other, str(tmp_path / "a.safetensors")) == {"missing": [], "unexpected": [], "shape": []}
    assert_same(other, model)


def test_tied_weights(tmp_path):
    def tied(seed):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model, other = tied(0), tied(1)
    save_weights(model, tmp_path / "a.safetensors")
    load_weights(other, tmp_path / "a.safetensors")
    assert_same(other, model)
    assert other[1].weight is other[0].weight


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "args": {"lr": 0.1}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    ],
)
def test_files_of_torch(tmp_path, wrap, zipped):
    model, other = make(), make(1)
    torch.save(wrap(model.state_dict()), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    load_weights(other, tmp_path / "a.pth")
    assert_same(other, model)


def test_prefix_of_the_model_itself(tmp_path):
    model, other = (nn.ModuleDict({"module": make(seed)}) for seed in (0, 1))
    save_weights(model, tmp_path / "a.safetensors")
    load_weights(other, tmp_path / "a.safetensors")
    assert_same(other, model)


def test_rename(tmp_path):
    model, other = make(), make(1)
    state = {f"net.{name}": value for name, value in model.state_dict().items()}
    torch.save({**state, "head.weight": torch.zeros(2)}, tmp_path / "a.pth")
    load_weights(other, tmp_path / "a.pth", rename=lambda n: n.removeprefix("net.") if n.startswith("net.") else None)
    assert_same(other, model)
    with pytest.raises(ValueError, match=r"rename gives two tensors of .* the name 'x'"):
        load_weights(other, tmp_path / "a.pth", rename=lambda name: "x")


# ------------------------------------------------------------------------------------------------------- what does not


def test_mismatch(tmp_path):
    model, other, untouched = make(), make(1, classes=5), make(1, classes=5)
    state = model.state_dict()
    del state["0.bias"]
    state.update({f"extra{i}": torch.zeros(1) for i in range(12)})
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_weights(other, tmp_path / "a.pth")
    assert str(error.value) == (
        f"load_weights: {tmp_path / 'a.pth'} does not fit Sequential: missing (1): 0.bias; "
        "unexpected (12): extra0, extra1, extra2, extra3, extra4 and 7 more; "
        "wrong shape (2): 3.weight is (3, 16), must be (5, 16), 3.bias is (3,), must be (5,)"
    )
    assert_same(other, untouched)
    left = load_weights(other, tmp_path / "a.pth", strict=False)
    assert left == {
        "missing": ["0.bias"],
        "unexpected": [f"extra{i}" for i in range(12)],
        "shape": ["3.weight", "3.bias"],
    }
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(other[3].weight, untouched[3].weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "other things in it: 'list'"),
        (torch.zeros(3), "other things in it: 'Tensor'"),
        ({}, "no tensors in it"),
        ({"epoch": 3, "weight": torch.zeros(3)}, "other things in it: 'epoch'"),
        ({"state_dict": 7}, "other things in it: 'state_dict'"),
        ({3: torch.zeros(3)}, "other things in it: 3"),
    ],
)
def test_no_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth has {message}; allowed is a \.safetensors file, or"):
        load_weights(make(), tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------------ damaged and hostile


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_damaged(tmp_path, kind):
    model, untouched = make(1), make(1)
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_weights(make(), path)
    else:
        torch.save(make().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    cuts = [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1]
    contents = [whole[:cut] for cut in cuts] + [b"\0" * 1000, b"\xff" * 1000, os.urandom(999), b"not weights\n" * 9]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*a\.(pth|safetensors); allowed is a \.safetensors file"):
            load_weights(model, path)
    assert_same(model, untouched)


def test_changed_bytes(tmp_path):
    """Whatever byte of the header is another one: it loads, or says ValueError."""
    path = tmp_path / "a.pth"
    torch.save(make().state_dict(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    raised = 0
    for place in range(0, 1000, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            load_weights(make(), path)
        except ValueError:
            raised += 1
    assert raised > 100


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_hostile(tmp_path, kind, suffix):
    marker, path = tmp_path / "ran", tmp_path / f"a{suffix}"
    content = {**make().state_dict(), "a": Hostile(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"cannot read .*; allowed is a \.safetensors file, or") as error:
        load_weights(make(), path)
    if suffix != ".safetensors" and kind != "pickle":
        assert "posix.mkdir" in str(error.value)
    assert "arbitrary code" not in str(error.value)
    assert not marker.exists()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(Hostile(tmp_path / "no" / "folder")))  # it would have run


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_weights(make(), tmp_path / "none.pth")
    with pytest.raises(IsADirectoryError):
        load_weights(make(), tmp_path)
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got 'a\.pth'"):
        save_weights(make(), "a.pth")


def test_without_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    assert set(load_file(path)) == {"a"}
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs safetensors; install it with: pip install 'pyzoo\[train\]'"):
        load_weights(make(), path)

"""The compiled core as a file and in a process: ABI, linkage, threads; what is packed; what fails, and how."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import pyzoo
from pyzoo import _ext

ROOT = Path(__file__).parent.parent
PACKAGE = Path(pyzoo.__file__).parent
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
is_clone = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")


@pytest.fixture(scope="module")
def core() -> Path:
    return Path(_ext.C.__file__)


def run(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kwargs)


def output(code: str, **kwargs) -> str:
    done = run(code, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


# --------------------------------------------------------------------------------------------------------------- binary


def test_core_is_small(core):
    from pyzoo import _C

    assert core.stat().st_size < (30e6 if _C.build_info()["cuda_archs"] else 5e6)


def test_core_knows_nothing_of_torch(core):
    symbols = subprocess.run([tool("nm"), "-DC", core], capture_output=True, text=True, check=True).stdout
    assert "nms" in symbols or "PyInit__C" in symbols
    assert not re.findall(r"\b(?:at|c10|torch|caffe2)::", symbols)


def test_core_links_no_torch_and_no_cuda(core):
    dynamic = subprocess.run([tool("readelf"), "-d", core], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert needed
    assert [lib for lib in needed if re.match(r"lib(torch|c10|cud|nv|python)", lib)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_dlpack_structs_are_those_of_torch(tmp_path):
    """csrc/common/dlpack.h, which is written by hand, against the header that torch ships."""
    torch = pytest.importorskip("torch")
    header = Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h"
    if not header.exists():
        pytest.skip("this torch ships no dlpack.h")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or pytest.skip("no C++ compiler")
    managed = {"manager_ctx": "manager_ctx", "deleter": "deleter"}
    structs = {  # ours -> (torch's, {our field: torch's})
        "Version": ("DLPackVersion", {"major": "major", "minor": "minor"}),
        "Device": ("DLDevice", {"device_type": "device_type", "device_id": "device_id"}),
        "DataType": ("DLDataType", {"code": "code", "bits": "bits", "lanes": "lanes"}),
        "DLTensor": ("DLTensor", dict.fromkeys(["data", "device", "ndim", "dtype", "shape", "strides", "byte_offset"])),
        "ManagedTensor": ("DLManagedTensor", {"tensor": "dl_tensor", **managed}),
        "ManagedTensorVersioned": (
            "DLManagedTensorVersioned",
            {"version": "version", "flags": "flags", "tensor": "dl_tensor", **managed},
        ),
        "ExchangeAPIHeader": ("DLPackExchangeAPIHeader", {"version": "version", "prev_api": "prev_api"}),
        "ExchangeAPI": (
            "DLPackExchangeAPI",
            dict.fromkeys(
                [
                    "header",
                    "managed_tensor_allocator",
                    "managed_tensor_from_py_object_no_sync",
                    "managed_tensor_to_py_object_no_sync",
                    "dltensor_from_py_object_no_sync",
                    "current_work_stream",
                ]
            ),
        ),
    }
    constants = {"kCPU": "kDLCPU", "kCUDA": "kDLCUDA"}
    constants |= {
        "kInt": "kDLInt",
        "kUInt": "kDLUInt",
        "kFloat": "kDLFloat",
        "kBfloat": "kDLBfloat",
        "kBool": "kDLBool",
    }
    lines = [f'#include "{ROOT}/csrc/common/dlpack.h"', f'#include "{header}"', "#include <cstddef>"]
    lines += ["using namespace pyzoo;"]
    for ours, (theirs, fields) in structs.items():
        lines.append(f'static_assert(sizeof(dlpack::{ours}) == sizeof(::{theirs}), "size of {ours}");')
        for mine, other in fields.items():
            other = other or mine
            for what in (f"offsetof({{}}, {mine})", f"sizeof({{}}::{mine})"):
                mine_is, other_is = what.format(f"dlpack::{ours}"), what.replace(mine, other).format(f"::{theirs}")
                lines.append(f'static_assert({mine_is} == {other_is}, "{ours}.{mine}");')
    for mine, other in constants.items():
        lines.append(f'static_assert(int(dlpack::{mine}) == int(::{other}), "{mine}");')
    source = tmp_path / "offsets.cpp"
    source.write_text("\n".join(lines) + "\nint main() {}\n")
    done = subprocess.run([compiler, "-std=c++17", "-fsyntax-only", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stub_lists_what_the_core_has():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    stubs = {node.name: [a.arg for a in node.args.args] for node in stub.body if isinstance(node, ast.FunctionDef)}
    names = {name for name in dir(_ext.C) if not name.startswith("_")}
    on_cuda = {name for name in names if name.endswith("_cuda")}  # if built: the same arguments as on the CPU
    assert stubs.keys() == names - on_cuda
    stubs |= {name: stubs[name.removesuffix("_cuda") + "_cpu"] for name in on_cuda}
    for name, arguments in stubs.items():
        signature = inspect.getdoc(getattr(_ext.C, name)).splitlines()[0]
        function = ast.parse(f"def {signature}: ...").body[0]
        assert [a.arg for a in function.args.args] == arguments, signature


def test_build_info_is_what_the_stub_says():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    info = next(node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "BuildInfo")
    fields = {node.target.id: ast.unparse(node.annotation).partition("[")[0] for node in info.body}
    assert {key: type(value).__name__ for key, value in _ext.C.build_info().items()} == fields
    assert _ext.C.build_info()["version"] == pyzoo.__version__


# -------------------------------------------------------------------------------------------------------------- process

RUN_KERNEL = """
import numpy as np, pyzoo.numpy as zoo
x = np.ones((2, 64, 50, 68), np.float32)
rois = np.array([[k % 2, k, k, k + 30, k + 20] for k in range(256)], np.float32) % 49
zoo.roi_align(x, rois, 7)
"""
TORCH_KERNEL = "import torch; torch.ones(300, 300).mm(torch.ones(300, 300)).exp().sum()\n"


@pytest.mark.parametrize("order", ["torch first", "pyzoo first"])
def test_one_openmp_runtime(order):
    pytest.importorskip("torch")
    parts = [TORCH_KERNEL, RUN_KERNEL]
    code = "".join(parts if order == "torch first" else parts[::-1])
    runtimes = ast.literal_eval(output(code + "from pyzoo import info; print(info.openmp_runtimes())"))
    if runtimes is None:
        pytest.skip("this system does not list the libraries of a process")
    assert len(runtimes) <= 1
    assert bool(runtimes) == _ext.C.build_info()["openmp"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_kernels_run_after_a_fork():
    """As in the worker of a DataLoader, which sets one thread. OpenMP's threads do not survive a fork."""
    pytest.importorskip("torch")
    code = f"""
import os, torch
torch.set_num_threads(2)
{RUN_KERNEL}
torch_out = torch.from_numpy(zoo.roi_align(x, rois, 7))
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = (zoo.roi_align(x, rois, 7) == torch_out.numpy()).all()
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert output(code).strip() == "0"


def test_import_is_light():
    code = """
import sys, time
start = time.perf_counter()
import pyzoo
seconds = time.perf_counter() - start
assert not {"torch", "numpy", "pyzoo._C"} & set(sys.modules), "pyzoo imports more than itself"
assert set(pyzoo.__all__) <= set(dir(pyzoo))
print(seconds)
"""
    assert float(output(code)) < 0.2


def test_import_of_numpy_part_needs_no_torch():
    output("import sys, pyzoo.numpy; assert 'torch' not in sys.modules and 'pyzoo._C' in sys.modules")


# ------------------------------------------------------------------------------------------------ missing, broken cores


@pytest.fixture
def package_without_core(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "pyzoo", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return tmp_path / "pyzoo"


# An editable install has a finder that would still find the core.
NO_FINDER = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]\n"
CALL = "import pyzoo, pyzoo.numpy as zoo; print('imported'); zoo.nms([[0, 0, 1, 1]], [1], .5)"


def call_in(folder: Path) -> str:
    done = run(NO_FINDER + CALL, cwd=folder.parent, env={**os.environ, "PYTHONPATH": str(folder.parent)})
    assert done.stdout.strip() == "imported", done.stderr
    assert done.returncode == 1
    assert "ImportError: pyzoo's compiled core (pyzoo._C) cannot be used." in done.stderr
    return done.stderr


def test_missing_core_says_so_at_the_first_call(package_without_core):
    message = call_in(package_without_core)
    assert f"built: nothing in {package_without_core}" in message
    assert f"needed: _C{EXT_SUFFIX}" in message
    assert "loader: ImportError: cannot import name '_C'" in message


def test_broken_core_gives_the_words_of_the_loader(package_without_core):
    (package_without_core / f"_C{EXT_SUFFIX}").write_bytes(b"\x7fELF" + b"garbage" * 100)
    message = call_in(package_without_core)
    assert f"built: _C{EXT_SUFFIX} in" in message
    loader = re.search(r"loader: ImportError: (.+)", message)
    assert f"_C{EXT_SUFFIX}" in loader[1]


def test_core_of_another_python_is_named(package_without_core):
    (package_without_core / "_C.cpython-399-other.so").write_bytes(b"")
    assert "built: _C.cpython-399-other.so in" in call_in(package_without_core)


def test_info_survives_a_broken_core(package_without_core):
    (package_without_core / f"_C{EXT_SUFFIX}").write_bytes(b"garbage")
    env = {**os.environ, "PYTHONPATH": str(package_without_core.parent)}
    code = NO_FINDER + "sys.modules['torch'] = None; from pyzoo import info; sys.exit(info.main())"
    done = run(code, cwd=package_without_core.parent, env=env)
    assert done.returncode == 1
    assert "loader: ImportError" in done.stdout
    assert re.search(r"roi_align +the core does not load +the core does not load", done.stdout)
    assert done.stderr == ""


def test_a_missing_core_leaves_the_triton_kernels(package_without_core):
    pytest.importorskip("triton")
    code = (
        "import torch, pyzoo\n"
        "x, boxes = torch.rand(1, 2, 6, 6, requires_grad=True), torch.tensor([[0.0, 1, 1, 5, 4]])\n"
        "with pyzoo.backend('triton'): out = pyzoo.ops.roi_align(x, boxes, 2); out.sum().backward()\n"
        "print(float((out - pyzoo.ops.roi_align_reference(x, boxes, 2)).abs().max()) < 1e-5, float(x.grad.sum()))"
    )
    env = {**os.environ, "PYTHONPATH": str(package_without_core.parent), "TRITON_INTERPRET": "1"}
    done = run(NO_FINDER + code, cwd=package_without_core.parent, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "True"
    assert float(done.stdout.split()[1]) == pytest.approx(8)


def test_info():
    from pyzoo import info

    data = info.collect()
    assert data["ops"].keys() == info.OPS.keys()
    assert all(backends["cpu"] == info.YES for backends in data["ops"].values())
    text = info.render(data)
    for expected in (pyzoo.__version__, data["core"]["isa"], data["core"]["file"], "batched_nms", "reference"):
        assert expected in text


def test_info_says_which_instruction_sets_there_are():
    code = "import sys; sys.modules['torch'] = None; from pyzoo import info; info.main()"
    done = run(code, env={**os.environ, "PYZOO_CPU_ISA": "mmx"})
    assert "PYZOO_CPU_ISA must be one of" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------------------- building


@pytest.fixture
def source_tree(tmp_path):
    """A copy of what git tracks."""
    files = subprocess.run([tool("git"), "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def setup_py(tree: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", *args]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env={**os.environ, **env}, timeout=300)


@is_clone
def test_source_distribution_is_complete(source_tree):
    done = setup_py(source_tree, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (source_tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    parts = ("csrc", "pyzoo", "tests", "benchmarks", "demo", "docs", "kernels")
    alone = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")
    tracked = {str(path.relative_to(source_tree)) for path in source_tree.rglob("*") if path.is_file()}
    wanted = {name for name in tracked if name.split("/")[0] in parts or name in alone}
    wanted = {name for name in wanted if "egg-info" not in name and "__pycache__" not in name}
    assert sorted(wanted - packed) == []
    assert [name for name in packed if name.endswith((".so", ".pyc", ".o")) or "__pycache__" in name] == []


@is_clone
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", "pyzoo build: PYZOO_CUDA=1 but no nvcc on PATH or in $CUDA_HOME/bin"),
        ("bogus", "pyzoo build: PYZOO_CUDA must be auto, 0, 1 or emulate, got 'bogus'"),
    ],
)
def test_build_without_nvcc_stops_with_one_line(source_tree, tmp_path_factory, value, message):
    pytest.importorskip("pybind11")
    path = tmp_path_factory.mktemp("bin")
    for name in ("c++", "g++", "as", "ld", "ninja"):
        if found := shutil.which(name):
            (path / name).symlink_to(found)
    nowhere = str(path / "nowhere")
    done = setup_py(source_tree, "build_ext", "--inplace", PATH=str(path), CUDA_HOME=nowhere, NVCC="", PYZOO_CUDA=value)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
    assert not list((source_tree / "pyzoo").glob("_C*.so"))


@is_clone
def test_build_without_a_core(source_tree, tmp_path):
    done = setup_py(source_tree, "build", "--build-base", str(tmp_path), PYZOO_CORE="0", CXX="no-compiler")
    assert done.returncode == 0, done.stderr
    assert "no compiled core: PYZOO_CORE=0" in done.stderr
    assert (tmp_path / "lib" / "pyzoo" / "kernels" / "roi_align.py").exists()

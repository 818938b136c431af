"""Builds pyzoo._C from csrc/ with ninja: no torch needed, nvcc optional.

PYZOO_CORE=1|0        compile the core, or nothing: the Triton kernels, on a GPU, are all that there is then
PYZOO_CUDA=auto|0|1   compile the CUDA kernels if nvcc (>= 12) is found (auto), never, or fail without it
PYZOO_CUDA=emulate    compile them as C++ that runs on the CPU: for tests
PYZOO_CUDA_ARCHS      compute capabilities, default "80 90": machine code for each, PTX for the last
CXX, CXXFLAGS, NVCC, MAX_JOBS are obeyed as usual.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall"]


def say(message: str) -> None:
    print(f"pyzoo build: {message}", file=sys.stderr, flush=True)


def openmp_flags(cxx: list[str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "openmp.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        found = (
            subprocess.run([*cxx, "-fopenmp", source, "-o", source.with_suffix("")], capture_output=True).returncode
            == 0
        )
    say("OpenMP found" if found else "no OpenMP: kernels run on one thread")
    return ["-fopenmp"] if found else []


def is_gnu(cxx: list[str]) -> bool:
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    return "Free Software Foundation" in version


def amount_of_code(source: Path) -> int:
    """Of a unit, with the code it includes: what takes long is compiled first, so that at the end no processor waits
    for another."""
    text = source.read_text()
    included = re.findall(r'"(\w+/\w+\.(?:inc|cuh))"', text)
    return len(text) + sum(amount_of_code(ROOT / "csrc" / name) for name in included)


def find_cuda() -> tuple[str, Path] | None:
    """nvcc and the folder of cudart to link, or None for a build without CUDA; says what was decided and why."""
    want = os.environ.get("PYZOO_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        raise SystemExit(f"pyzoo build: PYZOO_CUDA must be auto, 0, 1 or emulate, got {want!r}")
    if want == "0":
        say("CPU only: PYZOO_CUDA=0")
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    problem = "no nvcc on PATH or in $CUDA_HOME/bin"
    if nvcc:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)", told)
        plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        toolkit = re.search(r"TOP=(\S+)", plan)  # nvcc on PATH may be a link or a script
        top = Path(toolkit[1]) if toolkit else Path(nvcc).resolve().parent.parent
        found = [
            library
            for folder in ("lib64", "lib", "targets/*/lib")
            for library in top.glob(f"{folder}/libcudart_static.a")
        ]
        if not release or int(release[1]) < 12:
            problem = f"{nvcc} is older than CUDA 12"
        elif not found:
            problem = f"{nvcc} comes without libcudart_static.a"
        else:
            say(f"CUDA kernels with {nvcc}")
            return nvcc, found[0].parent
    if want == "1":
        raise SystemExit(f"pyzoo build: PYZOO_CUDA=1 but {problem}; install the CUDA toolkit (>= 12)")
    say(f"CPU only: {problem} (set PYZOO_CUDA=1 to insist)")
    return None


def cuda_flags() -> tuple[list[str], str]:
    """For nvcc: the GPUs to compile for, and other flags; and their names, for the binary to tell."""
    archs = os.environ.get("PYZOO_CUDA_ARCHS", "80 90").replace(",", " ").replace(".", "").split()
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    flags += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}", "--cudart=static", "-O3", "-std=c++17"]
    # No fused multiply-add but where a kernel asks for one: coordinates and overlaps come out as on the CPU.
    flags += ["--fmad=false", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    return flags, " ".join(archs)


# For g++. Without copies of functions, for constant arguments or inlined though nobody asked for it, and of loops, it
# takes less time and kernels are as fast; garbage, collected from 128 MB on, takes another tenth of the time.
GNU_FLAGS = ["--param=max-inline-insns-single=70", "--param=max-inline-insns-auto=15", "-fno-ipa-cp-clone"]
GNU_FLAGS += ["-fno-version-loops-for-strides", "-fno-split-loops", "-fno-split-paths", "-fno-predictive-commoning"]
GNU_FLAGS += ["-fno-gcse-after-reload", "--param=ggc-min-heapsize=1000000"]
# What nearly every kernel includes: g++ reads it once for all.
HEADERS = '#include "common/feature_map.h"\n#include "common/vec.h"\n'


class NinjaBuild(build_ext):
    """Compiles in build/, which stays between runs, so that only what changed is compiled again."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        folder = ROOT / "build" / sys.implementation.cache_tag
        folder.mkdir(parents=True, exist_ok=True)
        # An isolated build finds pybind11 at a new place each time; through a link every command line stays the same.
        link = folder / f"pybind11-{pybind11.__version__}"
        link.unlink(missing_ok=True)
        link.symlink_to(pybind11.get_include(), target_is_directory=True)

        cxx = shlex.split(os.environ.get("CXX", "c++"))
        gnu, openmp = is_gnu(cxx), openmp_flags(cxx)
        flags = [*FLAGS, *(GNU_FLAGS if gnu else []), *openmp, f"-DPYZOO_VERSION={VERSION}", f"-I{ROOT / 'csrc'}"]
        flags += [
            f"-isystem{link}",
            f"-isystem{sysconfig.get_path('include')}",
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        shared = (
            ["-undefined", "dynamic_lookup", "-bundle"] if sys.platform == "darwin" else ["-shared", "-Wl,--as-needed"]
        )
        if sys.platform != "darwin" and not any(flag.startswith("-g") for flag in flags):
            shared.append("-Wl,--strip-all")
        libraries = [*openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]

        sources = sorted((ROOT / "csrc").glob("**/*.cpp"), key=amount_of_code, reverse=True)
        sources.sort(key=lambda source: source.name != "bindings.cpp")  # first: it need not wait for the headers below
        cuda_sources = sorted((ROOT / "csrc").glob("**/*.cu"), key=amount_of_code, reverse=True)
        cuda = None
        if os.environ.get("PYZOO_CUDA") == "emulate":
            say("CUDA kernels as C++ on the CPU: PYZOO_CUDA=emulate")
            emulator = ["-x", "c++", f"-I{ROOT / 'tests' / 'emulator'}", "-Wno-unknown-pragmas"]
            cuda = f"{shlex.join([*cxx, *flags, *emulator])} -MMD -MF $out.d -c $in -o $out"
            flags.append('-DPYZOO_CUDA_ARCHS="emulated"')
        elif found := find_cuda():
            nvcc, cudart = found
            gpu_flags, archs = cuda_flags()
            flags.append(f'-DPYZOO_CUDA_ARCHS="{archs}"')
            # What ptxas tells of registers and spills goes to a file beside the object, for the tests.
            cuda = shlex.join([nvcc, *gpu_flags, flags[-1], f"-I{ROOT / 'csrc'}"])
            cuda += " -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }"
            libraries += [f"-L{cudart}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        if cuda:
            sources = cuda_sources + sources

        lines = [
            f"rule cxx\n command = {shlex.join(cxx)} {shlex.join(flags)} $more -MMD -MF $out.d -c $in -o $out",
            " depfile = $out.d\n deps = gcc\n description = $in",
            f"rule cuda\n command = {cuda}",
            " depfile = $out.d\n deps = gcc\n description = $in",
            f"rule link\n command = {shlex.join(cxx + shared)} $in {shlex.join(libraries)} -o $out",
            " description = $out",
        ]
        headers = folder / "headers.h"
        if gnu:
            if not headers.exists() or headers.read_text() != HEADERS:
                headers.write_text(HEADERS)
            lines += ["build headers.h.gch: cxx headers.h", " more = -x c++-header"]
        objects = []
        for source in sources:
            objects.append("_".join(source.relative_to(ROOT / "csrc").parts) + ".o")
            if source.suffix == ".cu":
                lines.append(f"build {objects[-1]}: cuda {source}")
            elif source.name == "bindings.cpp":  # no kernels, and most of it is pybind11
                lines += [f"build {objects[-1]}: cxx {source}", " more = -O1"]
            elif gnu:
                lines += [f"build {objects[-1]}: cxx {source} | headers.h.gch", " more = -include headers.h"]
            else:
                lines.append(f"build {objects[-1]}: cxx {source}")
        lines.append(f"build _C.so: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")

        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([ninja_program(), "-C", folder, *(["-j", jobs] if jobs else [])], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "_C.so", target)


def ninja_program() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    except ImportError:
        if program := shutil.which("ninja"):
            return program
        raise SystemExit("pyzoo build: ninja is needed (pip install ninja)") from None


core = [Extension("pyzoo._C", sources=[])]
if os.environ.get("PYZOO_CORE", "1") == "0":
    say("no compiled core: PYZOO_CORE=0")
    core = []
setup(version=VERSION, ext_modules=core, cmdclass={"build_ext": NinjaBuild})

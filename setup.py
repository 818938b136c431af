"""Builds pyzoo._C from csrc/ with ninja: no torch needed, nvcc optional.

PYZOO_CORE=1|0        compile the core, or nothing: the Triton kernels, on a GPU, are all that there is then
PYZOO_CUDA=auto|0|1   compile the CUDA kernels if nvcc is found (auto), never, or fail without it
PYZOO_CUDA_ARCHS      compute capabilities, default "80 90": machine code for each, PTX for the last
CXX, CXXFLAGS, NVCC, MAX_JOBS are obeyed as usual.
"""

import os
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


def faster_build_flags(cxx: list[str]) -> list[str]:
    """For g++: garbage, collected from 128 MB on, takes a tenth of its time, and copies of functions for constant
    arguments, made after all templates are chosen, another part."""
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    return ["--param=ggc-min-heapsize=1000000", "-fno-ipa-cp-clone"] if "Free Software Foundation" in version else []


def amount_of_code(source: Path) -> tuple[int, Path]:
    """Of an operator: what takes long is compiled first, so that at the end no processor waits for another."""
    return sum(file.stat().st_size for file in source.parent.iterdir()), source


def find_nvcc(sources: list[Path]) -> str | None:
    """The nvcc to use, or None for a build without CUDA; says what was decided and why."""
    want = os.environ.get("PYZOO_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        raise SystemExit(f"pyzoo build: PYZOO_CUDA must be auto, 0 or 1, got {want!r}")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if want == "1" and not nvcc:
        raise SystemExit(
            "pyzoo build: PYZOO_CUDA=1 but no nvcc on PATH or in $CUDA_HOME/bin; install the CUDA toolkit (>= 12)"
        )
    if want == "0":
        say("CPU only: PYZOO_CUDA=0")
    elif not nvcc:
        say("CPU only: no nvcc found (set PYZOO_CUDA=1 to insist)")
    elif not sources:
        say(f"CPU only: {nvcc} found, but this version has no CUDA kernels yet")
    else:
        say(f"CUDA kernels with {nvcc}")
        return nvcc
    return None


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
        openmp = openmp_flags(cxx)
        flags = [*FLAGS, *faster_build_flags(cxx), *openmp, f"-DPYZOO_VERSION={VERSION}", f"-I{ROOT / 'csrc'}"]
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

        kernels = sorted((ROOT / "csrc").glob("**/*.cpp"), key=amount_of_code, reverse=True)
        cuda_kernels = sorted((ROOT / "csrc").glob("**/*.cu"), key=amount_of_code, reverse=True)
        nvcc_flags: list[str] = []
        nvcc = find_nvcc(cuda_kernels)
        if nvcc:
            archs = os.environ.get("PYZOO_CUDA_ARCHS", "80 90").replace(",", " ").replace(".", "").split()
            nvcc_flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            nvcc_flags += [
                f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}",
                "--cudart=static",
                "-O3",
                "-std=c++17",
            ]
            nvcc_flags += ["--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            flags.append(f'-DPYZOO_CUDA_ARCHS="{" ".join(archs)}"')
            libraries += [
                f"-L{Path(nvcc).resolve().parent.parent / 'lib64'}",
                "-lcudart_static",
                "-lrt",
                "-ldl",
                "-lpthread",
            ]

        lines = [
            f"rule cxx\n command = {shlex.join(cxx)} {shlex.join(flags)} -MMD -MF $out.d -c $in -o $out",
            " depfile = $out.d\n deps = gcc\n description = $in",
            f"rule nvcc\n command = {nvcc} {shlex.join(nvcc_flags)} -MMD -MF $out.d -c $in -o $out",
            " depfile = $out.d\n deps = gcc\n description = $in",
            f"rule link\n command = {shlex.join(cxx + shared)} $in {shlex.join(libraries)} -o $out",
            " description = $out",
        ]
        objects = []
        for source in kernels + (cuda_kernels if nvcc else []):
            objects.append("_".join(source.relative_to(ROOT / "csrc").parts) + ".o")
            lines.append(f"build {objects[-1]}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {source}")
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

"""The demo on a picture whose answer is known; the verbs of the Makefile; what the README says that can be checked."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
ops = pytest.importorskip("torchvision").ops
Image = pytest.importorskip("PIL.Image")
ImageDraw = pytest.importorskip("PIL.ImageDraw")

import pyzoo.ops  # noqa: E402
from benchmarks import readme_table  # noqa: E402
from pyzoo.models._registry import table as models_table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DISC = (60.0, 20.0, 160.0, 120.0)


@pytest.fixture(scope="module")
def photographs():
    spec = importlib.util.spec_from_file_location("photographs", ROOT / "demo" / "photographs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def disc(tmp_path) -> Path:
    """An orange disc on noisy grey."""
    noise = torch.randint(60, 90, (140, 220, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    ImageDraw.Draw(image).ellipse(DISC, fill=(240, 130, 30))
    path = tmp_path / "disc.png"
    image.save(path)
    return path


# ----------------------------------------------------------------------------------------------------------------- demo


def test_demo_draws_a_picture_and_prints_both_times(photographs, disc, tmp_path, capsys):
    assert photographs.main(["--image", str(disc), "--output", str(tmp_path / "out"), "--runs", "1"]) == 0
    printed = capsys.readouterr().out
    for word in ("torchvision", "batched_nms", "MultiScaleRoIAlign", "roi_pool", "all results equal"):
        assert word in printed
    with Image.open(tmp_path / "out" / "disc.png") as picture:
        assert picture.size == (440, 140)


def test_demo_finds_the_object(photographs, disc):
    ((_, image),) = photographs.photographs([disc])
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(image.height, image.width, 3)
    boxes, scores, _ = photographs.detect(pixels.permute(2, 0, 1)[None] / 255, runs=1)
    assert scores[0] == scores.max()
    assert ops.box_iou(boxes[:1], torch.tensor([DISC])).item() > 0.7


def test_demo_fails_when_results_differ(photographs, disc, tmp_path, monkeypatch):
    monkeypatch.setattr(pyzoo.ops, "nms", lambda *args: ops.nms(*args)[:-1])
    with pytest.raises(SystemExit, match=r"nms.*differ"):
        photographs.main(["--image", str(disc), "--output", str(tmp_path), "--runs", "1"])


def test_demo_shrinks_and_turns_large_photographs(photographs, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("L", (1600, 800)).save(tmp_path / "side.jpg", exif=exif)
    ((name, image),) = photographs.photographs([tmp_path / "side.jpg"])
    assert (name, image.size, image.mode) == ("side", (320, 640), "RGB")


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("verb", ["help", "demo", "test", "bench", "lint", "format", "asan", "clean"])
def test_make_has_the_verb(verb):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "--dry-run", verb], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_formatters_have_one_version():
    makefile = dict(re.findall(r"(ruff|clang-format)==([\d.]+)", (ROOT / "Makefile").read_text()))
    hooks = dict(
        re.findall(
            r"(ruff|clang-format)(?:-pre-commit)?\n\s+rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text()
        )
    )
    assert makefile == hooks
    assert len(hooks) == 2


# --------------------------------------------------------------------------------------------------------------- README


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_readme_has_the_signatures(readme):
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\(.+\))` \|$", readme, flags=re.MULTILINE))
    assert {"roi_align", "roi_pool", "nms", "batched_nms"} <= rows.keys()
    for name, written in rows.items():
        signature = inspect.signature(getattr(pyzoo.ops, name))
        bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        assert written == str(inspect.Signature(bare)), name


def test_readme_names_files_that_exist(readme):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", readme):
        assert (ROOT / target).exists() or target == "docs/conformance.md", target


@pytest.mark.parametrize("mark", ["bench", "gpu"])
def test_readme_table_is_written_between_its_marks(readme, mark):
    written = readme_table.insert(readme, mark, "| a table |")
    assert written.count("| a table |") == 1
    assert readme_table.insert(written, mark, "") == readme_table.insert(readme, mark, "")
    with pytest.raises(ValueError, match="bench:begin"):
        readme_table.insert("nothing", "bench", "| a table |")


def test_readme_has_all_models(readme):
    assert readme_table.insert(readme, "models", models_table()) == readme, "run python -m benchmarks.readme_table"

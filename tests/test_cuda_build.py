"""What nvcc made of the CUDA kernels: ``KVSPN_CUDA=1 python setup.py build_ext`` leaves it in build."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "build" / "native"
OBJECTS = [FOLDER / "cuda-kernels.o", FOLDER / "cuda-op_kernels.o"]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
TYPES, TILES = 5, 2  # of weights, of rows
# 16-byte loads at least, past the L1 cache: four a turn of dot(), and keys and values of a split.
LINEAR, VERIFY, ATTEND = 4 * TYPES * TILES, 4 * TYPES * (TILES + 1), 2 * (8 * 3 + 4)
WIDE = {"KindE1": LINEAR, "KindE2": ATTEND, "KindE3": VERIFY, "step_kernel": LINEAR + ATTEND + VERIFY}
WIDE |= {"linear_kernel": LINEAR, "attention_kernel": ATTEND, "verify_kernel": VERIFY}

pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in OBJECTS), reason="not built: KVSPN_CUDA=1 python setup.py build_ext"
)


def tool(name: str) -> str:
    """A binary of the CUDA toolkit, or the one in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    wheel = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else Path()
    return shutil.which(name) or shutil.which(name, path=wheel) or pytest.skip(f"no {name} here")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def functions(request):
    """Name -> SASS, on one architecture."""
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    command = [tool("cuobjdump"), "-sass", "-arch", request.param]
    text = "".join(
        subprocess.run(
            [*command, str(file)], capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
        ).stdout
        for file in OBJECTS
    )
    parts = re.split(r"Function : (\S+)", text)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    if not found:
        pytest.skip(f"not built for {request.param}")
    return found


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_the_report_knows_no_spill(path):
    text = path.with_suffix(".o.report").read_text()
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(found) >= 7
    assert set(found) == {("0", "0", "0")}
    assert "error" not in text


def test_no_kernel_uses_local_memory(functions):
    for name, sass in functions.items():
        assert not re.search(r"\b(LDL|STL)\b", sass), name


@pytest.mark.parametrize("kernel", WIDE)
def test_weights_and_kv_come_in_wide_loads(functions, kernel):
    """What bypasses the L1 cache is what streams; all of it comes 16 bytes at a time."""
    (sass,) = (sass for name, sass in functions.items() if kernel in name)
    streaming = re.findall(r"\bLDG\.E\S*\.NA\S*", sass)
    assert len(streaming) >= WIDE[kernel]
    assert all(".128" in load for load in streaming), set(streaming)

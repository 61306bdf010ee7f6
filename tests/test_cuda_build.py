"""What nvcc made of the CUDA kernels: ``KVSPN_CUDA=1 python setup.py build_ext`` leaves it in build."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.sass import batches, innermost_loops

FOLDER = Path(__file__).parents[1] / "build" / "native"
OBJECTS = [FOLDER / "cuda-kernels.o", FOLDER / "cuda-op_kernels.o"]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
TYPES, TILES = 5, 2  # of weights, of rows
# 16-byte loads at least, past the L1 cache: four a turn of dot(), and keys and values of a split.
LINEAR, VERIFY, ATTEND = 4 * TYPES * TILES, 4 * TYPES * (TILES + 1), 2 * (8 * 3 + 4)
WIDE = {"KindE1": LINEAR, "KindE2": ATTEND, "KindE3": VERIFY, "step_kernel": LINEAR + ATTEND + VERIFY}
WIDE |= {"linear_kernel": LINEAR, "attention_kernel": ATTEND, "verify_kernel": VERIFY}

# The kernel that holds all stages keeps some values across them in local memory, at most this many bytes of a
# thread; every other kernel has all in registers.
KEPT = 512

RARE = 100  # instructions of a loop for each that touches local memory: on sm_90a some loops have one or two

LATER = 100  # instructions, those of a turn of weights at least: memory answers meanwhile

pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in OBJECTS), reason="not built: KVSPN_CUDA=1 python setup.py build_ext"
)


def tool(name: str) -> str:
    """A binary of the CUDA toolkit, or the one in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    wheel = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else Path()
    return shutil.which(name) or shutil.which(name, path=wheel) or pytest.skip(f"no {name} here")


def disassembled(architecture: str) -> dict[str, str]:
    """Name -> SASS."""
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    command = [tool("cuobjdump"), "-sass", "-arch", architecture]
    text = "".join(
        subprocess.run(
            [*command, str(file)], capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
        ).stdout
        for file in OBJECTS
    )
    parts = re.split(r"Function : (\S+)", text)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    if not found:
        pytest.skip(f"not built for {architecture}")
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES)
def functions(request):
    """Name -> SASS, on one architecture."""
    return disassembled(request.param)


@pytest.fixture(scope="module")
def hopper():
    """The loads of each stage, on the architecture whose SASS was read: others schedule in other ways."""
    found = {name: batches(sass) for name, sass in disassembled("sm_90a").items()}
    stages = {"linear": "KindE1", "attend": "KindE2", "verify": "KindE3"}
    return {
        stage: next(loads for name, loads in found.items() if kind in name) for stage, kind in stages.items()
    }


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_the_report_knows_no_spill(path):
    text = path.with_suffix(".o.report").read_text()
    spills = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(rf"Compiling entry function '(\w+)'.*\n(?:.*\n)??\s*{spills}", text)
    assert len(found) >= 7
    for name, frame, *stored in found:
        if "step_kernel" in name:
            assert int(frame) <= KEPT
        else:
            assert (frame, *stored) == ("0", "0", "0"), name
    assert "error" not in text


def test_local_memory_is_for_what_lies_between_stages(functions):
    """Only one kernel has any, and its loops that multiply hardly touch it: one instruction in hundreds."""
    local = re.compile(r"(LDL|STL)\b")
    for name, sass in functions.items():
        if "step_kernel" not in name:
            assert not re.search(r"\b(LDL|STL)\b", sass), name
            continue
        loops = [loop for loop in innermost_loops(sass) if any(opcode.startswith("FFMA") for opcode in loop)]
        assert len(loops) >= TYPES * TILES
        for loop in loops:
            assert len(list(filter(local.match, loop))) * RARE <= len(loop), name


@pytest.mark.parametrize("kernel", WIDE)
def test_weights_and_kv_come_in_wide_loads(functions, kernel):
    """What bypasses the L1 cache is what streams; all of it comes 16 bytes at a time."""
    (sass,) = (sass for name, sass in functions.items() if kernel in name)
    streaming = re.findall(r"\bLDG\.E\S*\.NA\S*", sass)
    assert len(streaming) >= WIDE[kernel]
    assert all(".128" in load for load in streaming), set(streaming)


@pytest.mark.parametrize("stage", ["linear", "verify"])
def test_activations_come_together(hopper, stage):
    """One trip to the L2 cache brings a row, not one for each 16 bytes of it."""
    found = [batch.count for batch in hopper[stage] if batch.kind == "fresh wide"]
    assert len(found) >= TYPES * TILES
    assert min(found) >= 4


@pytest.mark.parametrize("stage", ["linear", "verify"])
def test_norm_parameters_are_asked_for_with_the_rows(hopper, stage):
    """Four columns a load, weights and biases together, and long before the rows are normalised."""
    found = [batch for batch in hopper[stage] if batch.kind == "plain wide"]
    assert sum(batch.count for batch in found) >= 2 * TYPES * TILES
    assert min(batch.count for batch in found) >= 2
    assert sum(batch.used - batch.first >= 3 * LATER for batch in found) >= TYPES * TILES


def test_bias_and_residual_are_asked_for_with_the_weights(hopper):
    """And used when the product has been made."""
    for kind in ("plain", "fresh"):
        found = [batch for batch in hopper["linear"] if batch.kind == kind]
        assert sum(batch.used - batch.first >= LATER for batch in found) >= TYPES * TILES, kind


def test_the_mask_is_asked_for_with_the_weights(hopper):
    found = [batch for batch in hopper["verify"] if batch.kind == "plain"]
    assert sum(batch.used - batch.first >= LATER for batch in found) >= TYPES * TILES


def test_partial_results_come_together(hopper):
    """Of attention, twelve loads of a lane under way."""
    found = [batch.count for batch in hopper["attend"] if batch.kind == "fresh wide"]
    assert sum(count >= 12 for count in found) >= 4  # formats of keys and values


def test_nothing_waits_for_one_order_of_all_memory(functions):
    """A release or an acquire, of what a warp or a block has written, is enough."""
    for name, sass in functions.items():
        if "KindE4" not in name and "step_kernel" not in name:  # which write for the host
            assert "MEMBAR.SC" not in sass, name

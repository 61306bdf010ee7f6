"""Block sizes per architecture: a table, not a search, so that the first call never waits for tuning.

An output element is one chain of sums over BLOCK_K columns at a time, in order, whatever block it falls
into; a configuration belongs to an architecture, never to a number of rows. So results depend neither on
the rows of a call nor on what was tuned.

BLOCK_N: outputs of one program. BLOCK_K: inputs of one round of its loop. precision: of the products of
fp32 activations and 16-bit or integer weights; tf32x3 is fp32's accuracy on NVIDIA's tensor cores. fp32
weights always take IEEE products. elementwise: see `projection.dot`.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import torch

ROWS = 16  # of activations in one program; fewer are padded, so that one kernel serves any number
SPLIT = 64  # cached positions of one program of attention

# Chosen by reasoning and compiled without spills; not measured on each of these yet.
_TABLE: dict[str, dict[str, Any]] = {
    "sm_80": {"BLOCK_N": 32, "BLOCK_K": 64, "precision": "tf32x3", "num_warps": 8, "num_stages": 3},
    "sm_90": {"BLOCK_N": 32, "BLOCK_K": 64, "precision": "tf32x3", "num_warps": 4, "num_stages": 4},
    "sm_100": {"BLOCK_N": 32, "BLOCK_K": 64, "precision": "tf32x3", "num_warps": 4, "num_stages": 4},
    "sm_120": {"BLOCK_N": 32, "BLOCK_K": 64, "precision": "tf32x3", "num_warps": 4, "num_stages": 3},
    "gfx942": {"BLOCK_N": 32, "BLOCK_K": 64, "precision": "ieee", "num_warps": 4, "num_stages": 2},
    "interpreter": {
        "BLOCK_N": 256,
        "BLOCK_K": 256,
        "precision": "elementwise",
        "num_warps": 4,
        "num_stages": 1,
    },
}

target: ContextVar[str | None] = ContextVar("target", default=None)
"""The architecture that launches are recorded for; None for that of the device at hand."""


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        name, default = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0], "gfx942"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        name, default = f"sm_{major}{minor}", "sm_80" if major < 9 else f"sm_{major}0"
    return name if name in _TABLE else default if default in _TABLE else "sm_80"


def matrix(device: torch.device, weight: torch.dtype) -> dict[str, Any]:
    """The keywords of a kernel that multiplies by a matrix of this dtype."""
    found = dict(_TABLE[target.get() or _architecture(device)])
    precision = found.pop("precision")
    exact = weight == torch.float32 and precision == "tf32x3"
    return found | {"PRECISION": "ieee" if exact else precision, "FP8": weight == torch.float8_e4m3fn}


def precision(device: torch.device, dtype: torch.dtype) -> str:
    """How attention multiplies by keys and values of this dtype."""
    return str(matrix(device, dtype)["PRECISION"])

"""The module of kvspn/_native.pyi for CUDA devices; weights are on the CPU, all else is on the device."""

from kvspn._native import ABI_VERSION as ABI_VERSION
from kvspn._native import Engine as Engine
from kvspn._native import instruction_set as instruction_set

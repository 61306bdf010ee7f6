"""Where CI runs, a test is skipped only for a reason that is listed here: any other one fails the run."""

from __future__ import annotations

import os
import re

import pytest

ALLOWED = (
    # This machine has no such device.
    "no CUDA device.*",
    "flashinfer .*|the Triton kernels need a GPU|too large for a CPU's memory and patience",
    "the .* backend does not run on .*",
    # CI has one processor, and not every instruction set.
    "no (avx.*|amx) here",
    # What does not go together.
    "mp3 has at most two channels",
    ".* has no (bf16|fp16|int4|int8)|transformers takes floats",
    "compiled for a GPU's graphs; .*",
    # Other runtimes are compared with by hand.
    ".* skipped .*",
    # .ci/cuda builds it afterwards, where nvcc is.
    "not built: KVSPN_CUDA=1 .*|not built for .*|no (cuobjdump|nvdisasm) here",
)


def unexpected(reasons: list[str]) -> list[str]:
    """The reasons that are not allowed."""
    return sorted({reason for reason in reasons if not re.fullmatch("|".join(ALLOWED), reason)})


def _unexpected(config: pytest.Config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None or hasattr(config, "workerinput"):
        return []
    skipped = [report.longrepr[2] for report in reporter.stats.get("skipped", ()) if report.longrepr]
    return unexpected([reason.removeprefix("Skipped: ").strip() for reason in skipped])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexpected(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = _unexpected(terminalreporter.config)
    if reasons:
        terminalreporter.section("skipped for a reason that tests/support/skips.py does not allow", red=True)
    for reason in reasons:
        terminalreporter.line(reason)

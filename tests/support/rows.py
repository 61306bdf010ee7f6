"""A row of the benchmark's record."""

from kvspn.measure.timing import Row

STEP = Row(
    what="step",
    shape="tiny",
    backend="native",
    weights="fp32",
    batch=1,
    rows=1,
    kv_length=64,
    ms_median=2.0,
    ms_min=1.5,
    ms_max=3.25,
    bytes=4_000_000,
    gb_per_s=2.0,
    percent_of_measured_peak=50.0,
    launches=1,
    allocations=0,
    correct=True,
    device="cpu",
    cache="warm",
    flops=2_000_000,
    gflop_per_s=1.0,
    percent_of_measured_compute=10.0,
    host_synchronisations=None,
    ms=[1.5, 2.0, 3.25],
    read_ms=[1.0, 1.0, 1.25],
)

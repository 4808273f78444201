"""`pytest benchmarks`: one pytest-benchmark test per op, size and contender, of the sizes of `--quick`."""

from . import peers, timing

MOST = 2**30  # bytes: what needs more runs for too long to be run as often as pytest-benchmark does


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    peers.set_threads()
    runs = [
        (case, name)
        for device in timing.devices()
        for case in metafunc.module.cases(device, quick=True)
        for name in ("ours", *case.baselines, *case.bounds)
        if case.needs.get(name, 0) < MOST
    ]
    metafunc.parametrize("case, contender", runs, ids=[f"{case}-{name}" for case, name in runs])

"""`pytest benchmarks`: one pytest-benchmark test per op, size and contender."""

from . import timing


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    runs = [
        (case, name)
        for device in timing.devices()
        for case in metafunc.module.cases(device)
        for name in ("ours", *case.baselines, *case.bounds)
    ]
    metafunc.parametrize("case, contender", runs, ids=[f"{case}-{name}" for case, name in runs])

"""Benchmarks of every op against what a user would otherwise run. `pyreid bench` or `pytest benchmarks`."""

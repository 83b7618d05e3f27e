"""Benchmark suites: each builds contenders on equal work; `benchmark.py` times them in alternation."""

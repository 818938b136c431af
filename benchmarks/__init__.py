"""The benchmark suite: every case of ``tests/specs`` against the function a user would call instead.

``pyzoo bench`` and ``pytest benchmarks --benchmark-only`` run it; both time with :mod:`benchmarks.measure`.
"""

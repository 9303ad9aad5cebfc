"""Benchmarks of pykernels, run from the repository root: ``python -m bench --help``, or ``pytest bench``.

harness.py times, gate.py checks before anything is timed, machine.py describes the machine, report.py prints, and every
bench_<operator>.py holds the cases of one operator. Nothing here is imported by the package.
"""

"""Benchmarks of pykernels, run from the repository root: ``python -m bench --help``, or ``pytest bench``.

harness.py times, gate.py checks before anything is timed, machine.py describes the machine, report.py prints, peers.py
runs other runtimes, breakdown.py tells where the time of a training step goes, and every bench_<name>.py holds the
cases of one operator or model. Nothing here is imported by the package.
"""

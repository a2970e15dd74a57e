"""Benchmarks: tables of what the methods do to real models, made by the real stages; run by hand, not by pytest.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.sparsity --model stories260k --threads 1
    … the same with recovery or quantisation

Run them in the project's folder. Each prints a Markdown table and writes `tests/benchmarks/results/<name>-<model>.csv`.
What was computed once is kept in data/.scratch/benchmarks (`--cache`), so that an interrupted run goes on where it was.
"""

"""Benchmarks of the operators: ``python kernels/bench`` (``--help`` tells the rest).

    cases      the shapes, and random inputs for them
    providers  what is timed: plain operator (the baseline), the release's eager formula, ours
    gate       correctness first: nothing wrong is ever timed
    measure    one timed sample, bytes saved for backward, peak bytes
    worker     a fresh process that holds one provider and does what it is asked
    rounds     the parent: asks the workers in turn, so that noise hits all alike
    results    samples to rows, rows to CSV and back
    report     tables and figures, from CSV files alone
    machine_code  what the compiler makes of the Triton kernels: ``python kernels/bench machine-code``

A folder that is run, no part of any wheel.
"""

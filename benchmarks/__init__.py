"""Measurements of whole runs, outside the wheel: ``mitrain bench NAME`` in a clone of the repository.

parity/  ZeRO stages × precisions × ranks      claims/   what the papers claim and rows say (``bench ledger``)
faults/  kills, damage, hostile inputs         load.py   bytes of loading in shards
step.py  time and bytes of a training step     command.py  the commands; kernels: kernels/bench
results.py  rows that are measured once, and their files      ranks.py  work in processes of its own, several ranks together
"""

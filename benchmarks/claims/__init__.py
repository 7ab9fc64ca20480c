"""``mitrain bench ledger``: what the papers claim, and what the measured rows say of it.

`mit`, `pmf`, `mope` and `aurora` hold one function per claim, `rows` what these compute with, `ledger` the verdicts.
"""

from benchmarks.claims import aurora, mit, mope, pmf
from benchmarks.claims.claim import Claim

CLAIMS = [found for paper in (mit, pmf, mope, aurora) for found in vars(paper).values() if isinstance(found, Claim)]

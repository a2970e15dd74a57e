"""Exit codes of all commands; `edgepress --help` ends with this table.

  0    done; the answer is on stdout
  1    refused: one sentence on stderr says why, and the way out
  2    a wrong call: the usage and a sentence are on stderr
  130  interrupted (Ctrl-C, SIGTERM where a command says so)
  141  whoever read its stdout has gone

Where a code means something else:
  fit --device        0 FITS, 1 FITS_STREAMING, 2 DOES_NOT_FIT; fit refuses, and answers a wrong call, with 3
  gate, night --once  0 ACCEPT, 3 REGRESSION, 4 ANOMALOUS, 5 INFEASIBLE, 6 UNDECIDED; 1 there is no verdict
  lineage verify      1 something was altered or is missing; lineage refuses with 2
  verify              1 something differs from the commit; verify refuses with 2
"""

from __future__ import annotations

DONE, REFUSED, WRONG_CALL = 0, 1, 2
INTERRUPTED = 130
READER_GONE = 141
FIT = {"FITS": 0, "FITS_STREAMING": 1, "DOES_NOT_FIT": 2}
FIT_REFUSED = 3
VERDICTS = {"ACCEPT": 0, "REGRESSION": 3, "ANOMALOUS": 4, "INFEASIBLE": 5, "UNDECIDED": 6}
"""A verdict of the gate -> the code, of the gate and of a night alike."""
ALTERED = 1
LINEAGE_REFUSED = VERIFY_REFUSED = 2

"""The studies behind bench/simulate_gate.py. They use medbridge and are no part of it."""

import os

# One process per core does the work; threads of the linear algebra beneath would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

"""Tests. They run in two processes, so that the matrix products of NumPy use one thread in each."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported

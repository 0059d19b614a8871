"""The tests run side by side (pytest-xdist), so each worker, and what it starts, takes its part of the cores and no more."""

import os

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))  # read when torch is first imported

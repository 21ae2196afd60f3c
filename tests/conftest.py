"""One thread for each test process: more of them would fight over the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

"""The networks here are too small for more threads than one, also in the scripts that are run."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

"""Tests import the core files from the project's root, one folder up, and may run from anywhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

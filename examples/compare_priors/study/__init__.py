"""The code behind compare.py; it imports the scripts of super_resolution/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "super_resolution"))

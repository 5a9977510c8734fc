"""What compare.py is made of, beside the package and the scripts of super_resolution/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "super_resolution"))

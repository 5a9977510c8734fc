"""The paper's super-resolver, timed against the same network computed as its authors' code does."""

import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[3] / "examples" / "super_resolution"
if str(EXAMPLE) not in sys.path:
    sys.path.insert(0, str(EXAMPLE))

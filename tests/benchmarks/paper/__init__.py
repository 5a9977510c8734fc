"""Times the paper's super-resolver against the same network in the form of the authors' code."""

import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[3] / "examples" / "super_resolution"
if str(EXAMPLE) not in sys.path:
    sys.path.insert(0, str(EXAMPLE))

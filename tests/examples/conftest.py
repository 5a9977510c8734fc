"""The example's scripts import each other as top-level modules; so do their tests."""

import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "super_resolution"
if str(EXAMPLE) not in sys.path:
    sys.path.insert(0, str(EXAMPLE))

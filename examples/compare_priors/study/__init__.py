"""What compare.py is made of; images, files and errors are handled as in super_resolution/."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "super_resolution"))  # for `tvqrap`

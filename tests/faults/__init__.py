"""Planted faults: each breaks one line of the library, and the suite must notice.

Coverage shows what ran, not what was checked. When a bug is fixed, its reversal joins the list.
"""

from tests.faults.codebooks import CODEBOOKS
from tests.faults.gradients import GRADIENTS
from tests.faults.nestings import NESTINGS
from tests.faults.others import OTHERS
from tests.faults.quantizers import QUANTIZERS
from tests.faults.search import SEARCH

FAULTS = SEARCH | GRADIENTS | CODEBOOKS | QUANTIZERS | NESTINGS | OTHERS

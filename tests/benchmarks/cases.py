"""The table of everything that is measured."""

import dataclasses
from collections.abc import Callable
from typing import Any

from tests.benchmarks import ceilings, composition, exactness, pairs, startup
from tests.benchmarks.memory import Peak
from tests.benchmarks.pairs import AS_LONG, FASTER, Compare
from tests.benchmarks.peer import PEER
from tests.benchmarks.scaling import Grow
from tests.benchmarks.timing import Measured, Settings

PRODUCT, TEXTBOOK, PARTS = "the product alone", "the textbook", "the sum of the parts"
# Divisor and minimum of each size in a quick run.
QUICK = {"n": (32, 32), "k": (32, 32), "b": (16, 1)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: its part, subject, measurement, sizes, reference and target.

    ``target`` is None if there is none. Rows that need ``"peer"`` or ``"cuda"`` are left out where
    these are missing.
    """

    part: str
    what: str
    measure: Callable[..., Measured]
    sizes: dict[str, int]
    against: str
    target: tuple[str, float] | None
    needs: str = ""

    def run(self, settings: Settings) -> dict[str, Any]:
        """Measures the row and returns it as it is stored in the file."""
        sizes = {name: self._size(name, settings.quick) for name in self.sizes}
        return self.row(sizes, self.measure(settings, **sizes))

    def row(self, sizes: dict[str, int], measured: Measured) -> dict[str, Any]:
        target = None if self.target is None else {"bound": self.target[0], "of": self.target[1]}
        names = {"part": self.part, "what": self.what, "sizes": sizes, "against": self.against}
        return {**names, "target": target, **dataclasses.asdict(measured)}

    def _size(self, name: str, quick: bool) -> int:
        divisor, least = QUICK.get(name, (1, 0)) if quick else (1, 0)
        return max(self.sizes[name] // divisor, least)


def nkd(n: int, k: int, d: int = 64, **more: int) -> dict[str, int]:
    return {"n": n, "k": k, "d": d, **more}


def at_most(value: float) -> tuple[str, float]:
    return ("at most", value)


def at_least(value: float) -> tuple[str, float]:
    return ("at least", value)


search = Compare(pairs.search, AS_LONG)
search_tf32 = Compare(pairs.search_against_tf32, AS_LONG)
train = Compare(pairs.training, FASTER)
rotated = Compare(pairs.training_rotated, FASTER)
evaluate = Compare(pairs.evaluation, FASTER)
residual = Compare(composition.residual, AS_LONG)
grouped = Compare(composition.grouped, AS_LONG)
scales = Compare(composition.multi_scale, AS_LONG)
select = Compare(pairs.select, FASTER)
exact = exactness.against_float64
share = ceilings.share_of_product_rate

SEARCH, STEP, CALL = "nearest_indices", "VectorQuantizer, training", "VectorQuantizer, eval"
TURNED = "VectorQuantizer, training, rotation trick"
SELECT = "select_codes, forward and backward"
RESIDUAL, GROUPED, SCALES = "ResidualQuantizer", "GroupedQuantizer", "MultiScaleQuantizer"
RESIDUAL_STEP = "ResidualQuantizer, training"
TEXTBOOK_STEP = "its textbook, forward and backward"
PEER_STEP, PEER_CALL = f"{PEER}, training", f"{PEER}, eval"

# fmt: off
CASES = (
    # part, what, how, sizes, against, target, needs
    Case("search", SEARCH, search, nkd(65536, 1024), PRODUCT, at_most(1.25)),
    Case("search", SEARCH, search, nkd(16384, 8192), PRODUCT, at_most(1.25)),
    Case("search", SEARCH, search, nkd(4096, 65536), PRODUCT, at_most(1.25)),
    Case("search", SEARCH, search_tf32, nkd(65536, 1024), "the product in TF32", None, "cuda"),
    Case("search", SEARCH, search_tf32, nkd(16384, 8192), "the product in TF32", None, "cuda"),
    Case("search", SEARCH, search_tf32, nkd(4096, 65536), "the product in TF32", None, "cuda"),
    Case("training", STEP, train, nkd(65536, 1024), PEER, at_least(5), "peer"),
    Case("training", STEP, train, nkd(16384, 8192), PEER, at_least(10), "peer"),
    Case("training", STEP, train, nkd(256, 512), PEER, None, "peer"),
    Case("training", TURNED, rotated, nkd(65536, 1024), PEER, None, "peer"),
    Case("eval", CALL, evaluate, nkd(65536, 1024), PEER, at_least(5), "peer"),
    Case("eval", CALL, evaluate, nkd(16384, 8192), PEER, at_least(10), "peer"),
    Case("eval", CALL, evaluate, nkd(256, 512), PEER, None, "peer"),
    Case("residual", RESIDUAL_STEP, train, nkd(16384, 1024, q=8), PEER, at_least(4), "peer"),
    Case("composition", RESIDUAL, residual, nkd(16384, 1024, q=8), PARTS, at_most(1.3)),
    Case("composition", GROUPED, grouped, nkd(16384, 256, 8, q=8), PARTS, at_most(1.3)),
    Case("composition", GROUPED, grouped, nkd(16384, 1024, 64, q=8), PARTS, at_most(1.3)),
    Case("composition", SCALES, scales, {"b": 32, "k": 1024, "d": 64}, PARTS, at_most(1.3)),
    Case("select", SELECT, select, nkd(16384, 1024), TEXTBOOK, at_least(1.5)),
    Case("select", SELECT, select, nkd(4096, 8192), TEXTBOOK, at_least(2)),
    Case("memory", STEP, Peak("training, ours"), nkd(4096, 8192), "", None),
    Case("memory", STEP, Peak("training, ours"), nkd(65536, 8192), "", at_most(256)),
    Case("memory", STEP, Peak("training, ours"), nkd(1048576, 8192), "", None),
    Case("memory", CALL, Peak("eval, ours"), nkd(4096, 8192), "", None),
    Case("memory", CALL, Peak("eval, ours"), nkd(65536, 8192), "", None),
    Case("memory", CALL, Peak("eval, ours"), nkd(1048576, 8192), "", None),
    Case("memory", PEER_STEP, Peak("training, theirs"), nkd(4096, 8192), "", None, "peer"),
    Case("memory", PEER_STEP, Peak("training, theirs"), nkd(65536, 8192), "", None, "peer"),
    Case("memory", PEER_CALL, Peak("eval, theirs"), nkd(4096, 8192), "", None, "peer"),
    Case("memory", PEER_CALL, Peak("eval, theirs"), nkd(65536, 8192), "", None, "peer"),
    Case("memory", SELECT, Peak("select, ours"), nkd(1024, 65536), "", None),
    Case("memory", TEXTBOOK_STEP, Peak("select, textbook"), nkd(1024, 65536), "", None),
    Case("exactness", SEARCH, exact, nkd(16384, 8192, offset=0), "", at_most(1e-6)),
    Case("exactness", SEARCH, exact, nkd(16384, 8192, offset=100), "", at_most(1e-6)),
    Case("import", "import vqprior after import torch", startup.within, {}, "", at_most(100)),
    Case("import", "processes with it and without", startup.alternated, {}, "", None),
    Case("scaling", "time of a token as n grows", Grow("n"), nkd(1024, 1024), "", None),
    Case("scaling", "time of a token as k grows", Grow("k"), nkd(4096, 256), "", None),
    Case("scaling", "time of a token as d grows", Grow("d"), nkd(4096, 1024, 8), "", None),
    Case("scaling", "time of a token as q grows", Grow("q"), nkd(4096, 1024, q=1), "", None),
    Case("ceilings", "a large product", ceilings.product_rate, {}, "", None),
    Case("ceilings", "a large copy", ceilings.copy_rate, {}, "", None),
    Case("ceilings", SEARCH, share, nkd(65536, 1024), "a large product", None),
    Case("ceilings", SEARCH, share, nkd(16384, 8192), "a large product", None),
    Case("ceilings", SEARCH, share, nkd(4096, 65536), "a large product", None),
)
# fmt: on
PARTS_IN_ORDER = tuple(dict.fromkeys(case.part for case in CASES))

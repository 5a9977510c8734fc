"""The table of what every quantizer passes, made from the outcomes of the tests.

    pytest tests/contracts tests/quantizers/test_multi_scale.py --write-conformance

writes ``docs/conformance.md``.
"""

from pathlib import Path

import torch

from tests.contracts.factories import QUANTIZERS

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
HEAD = """# What every quantizer passes

Made from the outcomes of the tests by `pytest tests/contracts tests/quantizers/test_multi_scale.py
--write-conformance`. Rows are the configurations of `tests/contracts/factories.py`, and of
`tests/quantizers/test_multi_scale.py`. A cell says "yes" where every test of it passed, "no" where
one failed, and nothing where there is no test: `RequireFinite` waits for the device by design, and
compiling some scales costs minutes. Results were compared with those of the plain call, bit for bit
except for compiled graphs. Nestings that nobody listed are drawn at random by
`tests/contracts/test_cross_product.py`.

"""
# Test function, the parameters that pick a column if it has several, and the column.
COLUMNS = [
    ("test_decode_returns_what_forward_returned", {}, "decode = forward"),
    ("test_compiles_in_one_graph", {"training": True}, "compile, training"),
    ("test_compiles_in_one_graph", {"training": False}, "compile, eval"),
    ("test_exports_in_eval", {}, "export"),
    ("test_exports_with_a_free_batch_size", {}, "export"),
    ("test_nothing_waits_for_the_device", {}, "no sync"),
    ("test_autocast_changes_no_index_and_no_loss", {"low": torch.bfloat16}, "autocast bf16"),
    ("test_autocast_changes_no_index_and_no_loss", {"low": torch.float16}, "autocast fp16"),
    ("test_autocast_changes_nothing", {"low": torch.bfloat16}, "autocast bf16"),
    ("test_autocast_changes_nothing", {"low": torch.float16}, "autocast fp16"),
    ("test_activation_checkpointing_changes_nothing", {}, "checkpointing"),
    ("test_a_copy_gives_the_same", {}, "pickle, deepcopy"),
    ("test_copies_are_whole", {}, "pickle, deepcopy"),
    ("test_training_continues_bit_for_bit", {}, "save and continue"),
    ("test_what_masked_tokens_hold_does_not_matter", {}, "masks"),
    ("test_what_masked_positions_hold_does_not_matter", {}, "masks"),
]
NAMES = {id(make): name for name, make in QUANTIZERS.items()}


def cell(item):
    """``(row, column)`` of a collected test, or None."""
    spec = getattr(item, "callspec", None)
    if spec is None or "make" not in spec.params:
        return None
    row = NAMES.get(id(spec.params["make"]))
    for name, make in getattr(item.module, "MAKERS", {}).items():
        row = f"multi-scale: {name}" if make is spec.params["make"] else row
    for function, options, column in COLUMNS:
        picked = all(spec.params.get(name) == value for name, value in options.items())
        if row is not None and item.originalname == function and picked:
            return row, column
    return None


def gather(outcomes):
    """``{(row, column): passed}`` from what was collected: a cell passed if all its tests did."""
    cells = {}
    for cell, passed in outcomes:
        cells[cell] = cells.get(cell, True) and passed
    return cells


def render(outcomes):
    """The page, from ``{(row, column): passed}``."""
    columns = list(dict.fromkeys(column for _, _, column in COLUMNS))
    rows = list(dict.fromkeys(row for row, _ in outcomes))
    marks = {None: "", True: "yes", False: "**no**"}
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in rows:
        cells = (marks[outcomes.get((row, column))] for column in columns)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n"

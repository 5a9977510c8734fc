"""Without a process group, the functions of `_distributed` act as for one process."""

import torch
from torch.testing import assert_close

from vqprior import _distributed


def test_one_process_is_rank_0_of_1():
    assert (_distributed.is_active(), _distributed.rank(), _distributed.world_size()) == (
        False,
        0,
        1,
    )


def test_collectives_are_identities():
    x = torch.randn(3, 2)
    expected = x.clone()
    assert _distributed.all_reduce_sum_(x) is x
    assert _distributed.all_reduce_sum(x) is x
    assert _distributed.broadcast_(x) is x
    assert_close(_distributed.gather_rows(x), expected, rtol=0, atol=0)
    assert_close(_distributed.all_gather_stack(x), expected.unsqueeze(0), rtol=0, atol=0)

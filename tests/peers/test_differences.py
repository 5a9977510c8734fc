"""What `docs/moving_over.md` says of vector-quantize-pytorch, where that is quick to see.

Pinned to the release that was compared.
"""

from importlib.metadata import version

import pytest
import torch

RELEASE = "1.32.0"


@pytest.fixture
def peer():
    peer = pytest.importorskip("vector_quantize_pytorch", reason="compares with another package")
    if version("vector-quantize-pytorch") != RELEASE:
        pytest.skip(f"compares with release {RELEASE}")
    return peer


def test_one_broken_token_breaks_every_code(peer):
    quantizer = peer.VectorQuantize(dim=4, codebook_size=16)
    x = torch.randn(2, 32, 4)
    x[0, 0, 0] = torch.nan
    quantizer(x)
    assert quantizer.codebook.isnan().any(dim=1).all()


def test_large_indices_do_not_survive(peer):
    quantizer = peer.FSQ([1000, 1000, 100], return_indices=False)
    indices = torch.randint(0, 10**8, (1000,), dtype=torch.int32)
    again = quantizer.codes_to_indices(quantizer.indices_to_codes(indices))
    assert (again != indices).double().mean() > 0.5


def test_an_all_true_mask_changes_the_loss(peer):
    quantizer = peer.VectorQuantize(dim=4, codebook_size=16, use_cosine_sim=True)
    quantizer.train()
    x = torch.randn(2, 32, 4)
    losses = [
        quantizer(x, mask=mask, freeze_codebook=True)[2].item()
        for mask in (None, torch.ones(2, 32) > 0)
    ]
    assert losses[1] > 2 * losses[0]


def test_the_loss_is_a_buffer(peer):
    quantizer = peer.VectorQuantize(dim=4, codebook_size=16).eval()
    x = torch.randn(2, 32, 4)
    with torch.no_grad():
        loss = quantizer(x)[2]
        loss += 1.5
        assert quantizer(x)[2].item() == 1.5


def test_an_offset_costs_the_nearest_code(peer):
    quantizer = peer.VectorQuantize(dim=8, codebook_size=256).eval()
    x = 1000 + torch.randn(1, 1000, 8)
    quantizer._codebook.embed.copy_(x[:, :256])
    codes = quantizer.codebook.double()
    expected = torch.cdist(
        x[0].double(), codes, compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(dim=1)
    assert (quantizer(x)[1][0] != expected).double().mean() > 0.1


def test_a_codebook_that_was_set_is_undone(peer):
    quantizer = peer.VectorQuantize(dim=4, codebook_size=16, decay=0.99)
    codes = 10 * torch.randn(16, 4)
    quantizer.codebook = codes
    quantizer(codes.unsqueeze(0))  # tokens that are the codes
    assert (quantizer.codebook - codes).abs().max() > 1

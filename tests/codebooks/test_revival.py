"""`CodebookRevival`: what it revives, when it stops, and how it draws."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vqprior import CodebookEMA, CodebookRevival, EmbeddingCodebook, Selection, VectorQuantizer
from vqprior.codebooks._shared import _candidates

CPU = torch.device("cpu")


def make(vectors, **options):
    k, d = vectors.shape
    quantizer = VectorQuantizer(d, k, codebook=EmbeddingCodebook.from_codes(vectors))
    return quantizer, CodebookRevival(quantizer, **options)


def moved_rows(quantizer, revival, out):
    before = quantizer.codebook.weight.detach().clone()
    revival.step(out)
    return (quantizer.codebook.weight.detach() != before).any(dim=1)


def test_dead_codes_move_onto_tokens_and_live_ones_stay():
    start = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0], [-50.0, 50.0]])
    quantizer, revival = make(start, patience=5.0)
    x = torch.rand(40, 2)
    out = quantizer(x)
    moved = moved_rows(quantizer, revival, out)
    assert moved.tolist() == [False, False, True, True]
    for row in quantizer.codebook.weight.detach()[moved]:
        assert (x == row).all(dim=1).any()


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_a_collapsed_codebook_comes_back(learning):
    """All tokens choose one code at the start; nearly all codes are in use at the end."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 64)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    rules = [CodebookRevival(quantizer, patience=8.0, optimizer=optimizer)]
    if learning == "ema":
        rules.insert(0, CodebookEMA(quantizer, decay=0.9))
    used = []
    for _ in range(60):
        out = quantizer(10 + torch.randn(256, 4))
        used.append(out.indices.unique().numel())
        if learning == "gradient":
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        for rule in rules:
            rule.step(out)
    assert used[0] < 8
    assert min(used[-5:]) > 56


def test_moments_of_revived_rows_alone_are_zeroed():
    start = torch.cat([torch.zeros(1, 2), 100 + torch.randn(3, 2)])
    quantizer, _ = make(start)
    other = nn.Parameter(torch.zeros(4, 2))
    optimizer = torch.optim.Adam([quantizer.codebook.weight, other])
    (quantizer.codebook.weight + other).sum().backward()
    optimizer.step()
    state = optimizer.state[quantizer.codebook.weight]
    before = {name: value.clone() for name, value in state.items()}
    revival = CodebookRevival(quantizer, patience=1.0, optimizer=optimizer)
    moved = moved_rows(quantizer, revival, quantizer(torch.randn(20, 2)))
    assert moved.tolist() == [False, True, True, True]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not state[name][moved].any()
        assert_close(state[name][~moved], before[name][~moved], rtol=0, atol=0)
        assert (optimizer.state[other][name] != 0).all()
    assert_close(state["step"], before["step"])


def test_an_optimizer_that_has_not_stepped_is_no_obstacle():
    quantizer, _ = make(torch.cat([torch.zeros(1, 2), 100 + torch.randn(3, 2)]))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    revival = CodebookRevival(quantizer, patience=1.0, optimizer=optimizer)
    assert moved_rows(quantizer, revival, quantizer(torch.randn(20, 2))).any()


def test_a_window_closes_after_patience_tokens_for_each_code():
    start = torch.cat([torch.tensor([[0.0, 0.0], [0.1, 0.0]]), 100 + torch.randn(3, 2)])
    quantizer, revival = make(start, patience=4.0)
    moves = []
    for _ in range(8):  # a window is 5 codes * 4 tokens, that is, two steps of ten
        moves.append(moved_rows(quantizer, revival, quantizer(torch.randn(10, 2))).any().item())
    assert moves[:2] == [False, True]
    assert not any(moves[::2])


def test_a_codebook_far_from_the_data_does_not_wait_for_a_window():
    """Whatever the size of its batches."""
    quantizer, revival = make(torch.randn(256, 4), patience=1000.0)
    used = []
    for _ in range(8):
        out = quantizer(50 + torch.randn(128, 4))
        used.append(out.indices.unique().numel())
        revival.step(out)
    assert used[0] < 4
    assert min(used[1:]) > 40  # of 101 that are expected where codes are evenly used


def test_a_codebook_that_fits_the_data_waits_for_a_window():
    data = torch.randn(5000, 4)
    quantizer, revival = make(data[:256].clone(), patience=20.0)
    for start in range(0, 1000, 100):
        assert not moved_rows(quantizer, revival, quantizer(data[start : start + 100])).any()


def test_a_batch_of_silence_later_wipes_nothing_out():
    quantizer, revival = make(torch.randn(64, 4), patience=2.0)
    while revival.windows_0 == 0:
        revival.step(quantizer(torch.randn(100, 4)))
    silence = torch.zeros(50, 4)
    assert revival.tokens_0 + 50 < 128
    assert not moved_rows(quantizer, revival, quantizer(silence)).any()


def test_dead_is_relative_to_the_mean_use():
    start = torch.tensor([[0.0], [10.0], [20.0], [30.0]])
    x = torch.tensor([0.1] * 60 + [10.1] * 30 + [20.1] * 8 + [30.1] * 2).unsqueeze(1)
    for threshold, expected in [(0.0, 0), (0.07, 0), (0.09, 1), (0.33, 2), (1.21, 3)]:
        # The mean use is 25: 2 is 0.08 of it, 8 is 0.32, 30 is 1.2.
        quantizer, revival = make(start, patience=25.0, threshold=threshold)
        assert moved_rows(quantizer, revival, quantizer(x)).sum() == expected


def test_uses_add_up_over_a_window():
    start = torch.tensor([[0.0], [10.0]])
    quantizer, revival = make(start, patience=20.0, threshold=0.5)
    for value in (0.1, 0.1, 10.1):  # the second code is chosen late, but often enough
        assert not moved_rows(quantizer, revival, quantizer(torch.full((10, 1), value))).any()
    assert_close(revival.uses_0, torch.tensor([20.0, 10.0]))
    assert not moved_rows(quantizer, revival, quantizer(torch.full((10, 1), 0.1))).any()
    assert_close(revival.uses_0, torch.zeros(2))
    assert_close(revival.tokens_0, torch.zeros(()))


@pytest.mark.full
@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_churn_dies_out_on_stationary_data(learning):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 32)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    ema = CodebookEMA(quantizer, decay=0.9) if learning == "ema" else None
    revival = CodebookRevival(quantizer, patience=20.0, optimizer=optimizer)
    moves = []
    for _ in range(300):  # a window is five steps
        out = quantizer(5 + torch.randn(128, 4))
        if ema is None:
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        else:
            ema.step(out)
        moves.append(moved_rows(quantizer, revival, out).sum().item())
    assert sum(moves[:100]) >= 20
    assert sum(moves[-100:]) <= 2  # of 640 chances


@pytest.mark.parametrize("learning", ["ema", "none"])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
def test_data_with_fewer_distinct_points_than_codes_stops_moving(learning, offset, low):
    """The bias of an EMA and the rounding of bfloat16 must not count as new tokens."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 128).to(low)
    ema = CodebookEMA(quantizer, decay=0.9) if learning == "ema" else None
    revival = CodebookRevival(quantizer, patience=2.0)
    points = (offset + 3 * torch.randn(5, 4)).to(low)
    moves = []
    for _ in range(200):
        out = quantizer(points[torch.randint(5, (64,))])
        if ema is not None:
            ema.step(out)
        moves.append(moved_rows(quantizer, revival, out).sum().item())
    assert sum(moves[:50]) > 0
    assert sum(moves[-100:]) == 0
    assert quantizer(points).indices.unique().numel() == 5


def test_a_large_offset_does_not_hide_errors():
    """Tokens at distance 1 are not duplicates, even 1000 away from the origin."""
    torch.manual_seed(0)
    quantizer, revival = make(1000 + torch.randn(32, 4), patience=4.0)
    quantizer.codebook.weight.data[1:] += 500
    for _ in range(30):
        revival.step(quantizer(1000 + torch.randn(256, 4)))
    assert quantizer(1000 + torch.randn(2000, 4)).indices.unique().numel() >= 30


def test_a_massive_token_does_not_hide_errors():
    """The spread of the tokens is that of most of them."""
    torch.manual_seed(0)
    quantizer, revival = make(torch.randn(32, 4), patience=4.0)
    quantizer.codebook.weight.data[1:] += 500
    for _ in range(30):
        x = torch.randn(256, 4)
        x[3] = 1e6
        revival.step(quantizer(x))
    assert quantizer(torch.randn(2000, 4)).indices.unique().numel() >= 28


def test_continues_exactly_from_its_state():
    quantizer, revival = make(100 + torch.randn(16, 2), patience=6.0)
    batches = torch.randn(9, 50, 2)
    for x in batches[:4]:
        revival.step(quantizer(x))
    other, restored = make(torch.zeros(16, 2), patience=6.0)
    other.load_state_dict(quantizer.state_dict())
    restored.load_state_dict(revival.state_dict())
    for x in batches[4:]:
        revival.step(quantizer(x))
        restored.step(other(x))
    assert_close(other.state_dict(), quantizer.state_dict(), rtol=0, atol=0)
    assert_close(restored.state_dict(), revival.state_dict(), rtol=0, atol=0)


def test_seeds_draw_differently_and_a_seed_always_the_same():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(9)
        quantizer, revival = make(100 + torch.randn(16, 2), patience=1.0, seed=seed)
        revival.step(quantizer(torch.randn(64, 2)))
        results.append(quantizer.codebook.weight.detach())
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[0] != results[2]).any()


def splitmix64(state, count):
    """Vigna's splitmix64.c in Python integers."""
    word = (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & word
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        yield z ^ (z >> 31)


def test_the_oracle_gives_the_published_numbers():
    assert list(splitmix64(1234567, 5)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert next(splitmix64(0, 1)) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("step", [0, 1, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31])  # that of the second codebook
def test_numbers_are_those_of_splitmix64(step, seed):
    count = 7
    ours = _candidates.draw_integers(seed, torch.tensor(step), count, CPU)
    skipped = (0x9E3779B97F4A7C15 * ((seed << 32) + step * count)) & ((1 << 64) - 1)
    assert ours.tolist() == [z >> 1 for z in splitmix64(skipped, count)]


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_numbers_are_uniform_and_uncorrelated(seed):
    drawn = [_candidates.draw_integers(seed, torch.tensor(step), 500, CPU) for step in range(100)]
    rows = torch.stack(drawn).double() / 2**63
    n, flat = rows.numel(), rows.reshape(-1)
    assert ((flat >= 0) & (flat < 1)).all()
    # Four standard errors each: mean, share of each of 20 bins, correlation of neighbors.
    assert (flat.mean() - 0.5).abs() <= 4 * (1 / 12 / n) ** 0.5
    shares = torch.bincount((flat * 20).long(), minlength=20) / n
    assert ((shares - 0.05).abs() <= 4 * (0.05 * 0.95 / n) ** 0.5).all()
    for a, b in [(rows[:, 1:], rows[:, :-1]), (rows[1:], rows[:-1])]:
        correlation = torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1]
        assert correlation.abs() <= 4 / a.numel() ** 0.5


def test_every_counted_token_is_equally_likely():
    """Half of 50 tokens are masked; each of the others is drawn for 1 in 25 codes."""
    k = 10_000
    mask = torch.arange(50) % 2 == 0
    inputs = torch.arange(50.0).unsqueeze(1)
    selection = Selection(
        inputs=torch.where(mask.unsqueeze(1), inputs, 0.0),
        codes=torch.zeros(50, 1),
        indices=torch.where(mask, 0, -1),
        mask=mask,
    )
    chance = _candidates.draw_integers(0, torch.tensor(0), k, CPU)
    candidates, errors = _candidates.draw_candidates([selection], chance)
    shares = torch.bincount(candidates.squeeze(1).long(), minlength=50) / k
    assert not shares[~mask].any()
    assert ((shares[mask] - 1 / 25).abs() <= 4 * (0.04 * 0.96 / k) ** 0.5).all()
    assert_close(errors, candidates.square())


def test_wrong_arguments():
    quantizer = VectorQuantizer(4, 8)
    with pytest.raises(ValueError, match=r"^`threshold` must be at least 0\.0, got -0\.1\.$"):
        CodebookRevival(quantizer, threshold=-0.1)
    with pytest.raises(ValueError, match=r"^`patience` must be greater than 0, got 0\.0\.$"):
        CodebookRevival(quantizer, patience=0.0)
    for seed in (-1, 2**31):
        message = rf"^`seed` must be in \[0, 2147483648\), got {seed}\.$"
        with pytest.raises(ValueError, match=message):
            CodebookRevival(quantizer, seed=seed)
    expected = "CodebookRevival(threshold=0.1, patience=20.0, seed=0)"
    assert repr(CodebookRevival(quantizer)) == expected

"""The random bits: the specification against published answers, and the C++ kernels against the specification."""

import pytest
import torch
from torch import Tensor

from pykernels import random_bits
from pykernels.random_bits import draws16, draws16_at, dropout_factors, keep_threshold, philox4x32_10, uniform_noise

# kat_vectors of the Random123 library: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_published_known_answers(counter: str, key: str, result: str) -> None:
    got = philox4x32_10(torch.tensor(words(counter)), torch.tensor(words(key)))
    assert got.tolist() == words(result)


def test_known_answers_as_draws() -> None:
    """The layout of draws, written out: low half first, eight to a counter, the seed's low half first in the key."""
    counter, key, result = (words(text) for text in KNOWN_ANSWERS[2])
    seed = torch.tensor((key[1] << 32 | key[0]) - 2**64 * (key[1] >> 31))
    element = (counter[1] << 32 | counter[0]) % 2**60 * 8  # elements are below 2**63
    answer = philox4x32_10(torch.tensor([counter[0], counter[1] % 2**28, *counter[2:]]), torch.tensor(key)).tolist()
    expected = [half for word in answer for half in (word & 0xFFFF, word >> 16)]
    assert draws16_at(seed, element + torch.arange(8), stream=counter[2], step=counter[3]).tolist() == expected

    halves = [half for word in words(KNOWN_ANSWERS[0][2]) for half in (word & 0xFFFF, word >> 16)]
    assert draws16(torch.tensor(0), 1, 8).tolist() == [halves]
    assert result != answer


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 17, 64])
def test_rows_begin_at_multiples_of_eight(n: int) -> None:
    seed = torch.tensor(99)
    element = torch.arange(5).unsqueeze(-1) * (-(-n // 8) * 8) + torch.arange(n)
    assert torch.equal(draws16(seed, 5, n), draws16_at(seed, element))


def test_shards_by_runs_draw_the_bits_of_the_whole() -> None:
    """A parameter shard is described by runs (start, length, stride) of the flat index in the whole tensor."""
    seed, whole = torch.tensor(-5), draws16_at(torch.tensor(-5), torch.arange(1000), stream=3, step=17)
    runs = [(0, 100, 1), (3, 40, 7), (999, 1, 1), (500, 0, 1), (998, 30, -5)]
    shard = torch.cat([start + stride * torch.arange(length) for start, length, stride in runs])
    assert torch.equal(draws16_at(seed, shard, stream=3, step=17), whole[shard])


def test_streams_steps_and_seeds_differ() -> None:
    draws = [
        draws16(torch.tensor(seed), 4, 16, stream, step)
        for seed, stream, step in [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**31, 0)]
    ]
    for i, a in enumerate(draws):
        assert all((a == b).float().mean() < 0.1 for b in draws[:i])


def test_elements_beyond_32_bits() -> None:
    """#10: the high word of the counter is used."""
    seed = torch.tensor(11)
    high = draws16_at(seed, torch.tensor([8 * 2**32, 8 * 2**32 + 1]))
    assert not torch.equal(high, draws16_at(seed, torch.tensor([0, 1])))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1 - 2**-16])
def test_dropout_keeps_the_mean(p: float) -> None:
    """Over all 65536 draws exactly `threshold` are kept, and their scale makes the mean 1 but for one rounding."""
    factors = dropout_factors(torch.arange(65536), p)
    threshold = keep_threshold(1 - p)
    assert factors.dtype == torch.float32 and int((factors > 0).sum()) == threshold
    assert factors.double().mean().item() == pytest.approx(1.0, abs=2**-24)
    assert factors.max().item() == torch.tensor(65536 / threshold, dtype=torch.float32).item()


def test_keep_threshold_rounds_in_double() -> None:
    assert [keep_threshold(p) for p in (0.0, 0.5, 1.0, 0.9, 2**-17)] == [0, 32768, 65536, 58982, 1]
    with pytest.raises(ValueError, match="keep_p"):
        keep_threshold(2**-18)


def test_noise_is_symmetric_and_bounded() -> None:
    e = uniform_noise(torch.arange(65536), 0.25)
    assert e.dtype == torch.float32 and e.abs().max() < 0.25
    assert torch.equal(e, -e.flip(0))


def test_draws_look_uniform() -> None:
    draws = draws16(torch.tensor(2024), 4096, 64).double()
    assert abs(draws.mean().item() / 32767.5 - 1) < 0.005
    counts = torch.bincount((draws.flatten() // 4096).long(), minlength=16).double()
    expected = draws.numel() / 16
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 15 degrees of freedom: p = 1e-4


# --- the C++ kernels ---


def cpp(seed: int, rows: int, n: int, stream: int = 0, step: int = 0) -> Tensor:
    return torch.ops.pykernels._random_bits(torch.tensor(seed), rows, n, stream, step)


@pytest.mark.parametrize("seed", SEEDS)
def test_kernels_draw_the_same_bits(kernels: str, seed: int) -> None:
    for rows, n in [(1, 1), (3, 7), (5, 8), (2, 9), (70, 33), (129, 127), (1, 1000), (1000, 1), (0, 8), (8, 0)]:
        assert torch.equal(cpp(seed, rows, n), draws16(torch.tensor(seed), rows, n)), (rows, n)
    for stream, step in [(1, 0), (0, 1), (2**31, 2**32 - 1)]:
        assert torch.equal(cpp(seed, 9, 40, stream, step), draws16(torch.tensor(seed), 9, 40, stream, step))


def test_kernels_do_not_depend_on_threads(kernels: str) -> None:
    """#14, #27."""
    torch.set_num_threads(1)
    one = cpp(3, 500, 77)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        assert torch.equal(cpp(3, 500, 77), one)


def test_kernels_refuse_other_seeds(extension: object) -> None:
    with pytest.raises(TypeError, match="^seed"):
        torch.ops.pykernels._random_bits(torch.tensor(1.0), 1, 8, 0, 0)
    with pytest.raises(ValueError, match="^rows"):
        torch.ops.pykernels._random_bits(torch.tensor(1), -1, 8, 0, 0)


def test_a_seed_is_one_draw_of_the_default_generator(extension: object) -> None:
    """So that torch.manual_seed governs it, and an installation without the extension draws the same."""
    torch.manual_seed(42)
    drawn = [torch.ops.pykernels._seed() for _ in range(3)]
    torch.manual_seed(42)
    again = [torch.empty((), dtype=torch.int64).random_(-(2**63), None) for _ in range(3)]
    assert drawn == again and len({int(seed) for seed in drawn}) == 3
    assert drawn[0].dtype == torch.int64 and drawn[0].shape == ()
    assert random_bits.draws16(drawn[0], 1, 8).shape == (1, 8)

"""The order of a training: every view as often as any, side by side as asked, and the same from any step."""

from collections import Counter

import numpy as np
import pytest

from edgekd.data.order import Order

IDS = np.random.default_rng(0).integers(0, 2**63, 23).astype(np.uint64)


def order(views: int, per_decode: int, pool: np.ndarray | None = None) -> Order:
    pool = np.arange(23) if pool is None else pool
    return Order(pool, IDS[pool], views, per_decode, 5)


@pytest.mark.parametrize(("views", "per_decode"), [(1, 1), (4, 1), (4, 2), (6, 3), (8, 8)])
def test_in_as_many_epochs_as_views_every_view_of_every_sample_comes_once(views: int, per_decode: int) -> None:
    for start in (0, 23 * views):
        samples, turns = order(views, per_decode).draws(start, start + 23 * views)
        counts = Counter(zip(samples.tolist(), turns.tolist(), strict=True))

        assert len(counts) == 23 * views
        assert set(counts.values()) == {1}


def test_views_of_one_decoding_stand_side_by_side() -> None:
    samples, turns = order(6, 3).draws(0, 69)

    assert (samples.reshape(23, 3) == samples.reshape(23, 3)[:, :1]).all()
    assert (np.diff(turns.reshape(23, 3), axis=1) % 6 == 1).all()
    assert len(set(samples.tolist())) == 23


def test_any_part_is_the_same_as_of_the_whole() -> None:
    whole = order(4, 2).draws(0, 400)
    for first, last in ((0, 7), (41, 52), (100, 101), (13, 390)):
        part = order(4, 2).draws(first, last)
        assert (part[0] == whole[0][first:last]).all()
        assert (part[1] == whole[1][first:last]).all()


def test_rounds_are_shuffled_anew_and_seeds_differ() -> None:
    first, second = order(1, 1).draws(0, 23)[0], order(1, 1).draws(23, 46)[0]
    other = Order(np.arange(23), IDS, 1, 1, 6).draws(0, 23)[0]

    assert sorted(first) == sorted(second) == sorted(other) == list(range(23))
    assert (first != second).any()
    assert (first != other).any()


def test_a_part_of_the_samples_comes_the_more_often() -> None:
    samples, turns = order(2, 1, pool=np.array([3, 8, 20])).draws(0, 24)

    assert Counter(samples.tolist()) == {3: 8, 8: 8, 20: 8}
    assert set(Counter(zip(samples.tolist(), turns.tolist(), strict=True)).values()) == {4}

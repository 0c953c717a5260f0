from collections import Counter

import pytest

from tnt_timm.data.sampling import TrainingSampler, evaluation_batches


def keys(num_images=60, num_samples=60, repeats=1, seed=42, rank=0, world_size=1, epoch=0, start=0):
    sampler = TrainingSampler(num_images, num_samples, repeats, seed, rank, world_size)
    sampler.set_epoch(epoch, start)
    found = list(sampler)
    assert len(sampler) == len(found)
    return found


def indices(**arguments):
    return [key.index for key in keys(**arguments)]


def test_an_epoch_is_a_shuffling_without_repetition():
    assert sorted(indices()) == list(range(60)) != indices()
    found = [i for rank in range(3) for i in indices(num_images=100, num_samples=33, rank=rank, world_size=3)]
    assert len(found) == len(set(found)) == 99 and set(found) <= set(range(100))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_order_does_not_depend_on_the_number_of_ranks(world_size, repeats):
    alone = keys(repeats=repeats)
    assert [key.position for key in alone] == list(range(60))
    for rank in range(world_size):
        settings = dict(num_samples=60 // world_size, repeats=repeats, rank=rank, world_size=world_size)
        assert keys(**settings) == alone[rank::world_size]


def test_each_epoch_and_seed_has_its_own_order():
    orders = [tuple(indices(seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    assert keys(seed=1, epoch=5) == keys(seed=1, epoch=5)
    assert {key.epoch for key in keys(epoch=5)} == {5}


def test_repeats_put_an_image_three_times_in_a_row():
    found = indices(repeats=3)
    assert found[0::3] == found[1::3] == found[2::3]
    assert Counter(Counter(found).values()) == {3: 20}  # a third of the 60 images, each three times
    seen = [frozenset(indices(repeats=3, epoch=epoch)) for epoch in range(6)]
    assert len(set(seen)) == 6  # another third in each epoch
    assert set().union(*seen) > seen[0]


def test_repeats_fall_into_one_global_batch():
    """Three ranks of two: a global batch is six samples in a row of the order, two images three times each."""
    dealt = [indices(num_samples=20, repeats=3, rank=rank, world_size=3) for rank in range(3)]
    for start in range(0, 20, 2):
        batch = [index for found in dealt for index in found[start : start + 2]]
        assert sorted(Counter(batch).values()) == [3, 3]


@pytest.mark.parametrize("start", [0, 1, 17, 20])
def test_start_skips_exactly_so_many(start):
    assert keys(num_samples=20, world_size=3, rank=1, start=start) == keys(num_samples=20, world_size=3, rank=1)[start:]


def test_imagenet_on_eight_ranks_has_1251_updates():
    """The official run: 1,281,167 images, 8 x 128, three repeats; whole global batches only."""
    images, ranks, batch = 1_281_167, 8, 128
    updates = images // (ranks * batch)
    assert updates == 1_251
    found = keys(images, updates * batch, repeats=3, rank=7, world_size=ranks, start=1_250 * batch)
    assert len(found) == 128  # the last update
    assert found[-1].position == 1_251 * 1_024 - 1
    assert len({key.index for key in found}) == 128  # 8 ranks > 3 copies: never twice on one rank


@pytest.mark.parametrize("arguments", [(60, 31, 1, 42, 0, 2), (1_281_167, 1_252 * 128, 1, 42, 0, 8)])
def test_more_samples_than_images_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{arguments[-1]} x {arguments[1]} samples from {arguments[0]} images"):
        TrainingSampler(*arguments)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_images", [1, 7, 12, 360])
def test_evaluation_has_each_image_once_in_the_same_batches(num_images, world_size):
    dealt = [evaluation_batches(num_images, 5, rank, world_size) for rank in range(world_size)]
    together = sorted(list(batch) for batches in dealt for batch in batches)
    assert [index for batch in together for index in batch] == list(range(num_images))
    assert together == list(map(list, evaluation_batches(num_images, 5, 0, 1)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1

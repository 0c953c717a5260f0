from collections import Counter

import pytest

from tnt_timm.data.sampling import EvaluationBatches, TrainingSampler


def keys(num_images=60, num_samples=60, repeats=1, seed=42, rank=0, world_size=1, epoch=0, start=0):
    sampler = TrainingSampler(num_images, num_samples, repeats, seed, rank, world_size)
    sampler.set_epoch(epoch, start)
    found = list(sampler)
    assert len(sampler) == len(found)
    return found


def test_each_image_at_most_once_per_epoch():
    indices = [key.index for rank in range(3) for key in keys(num_images=100, num_samples=33, rank=rank, world_size=3)]
    assert len(indices) == len(set(indices)) == 99
    assert set(indices) <= set(range(100))


def test_whole_epoch_is_a_shuffling_of_all_images():
    indices = [key.index for key in keys()]
    assert sorted(indices) == list(range(60)) != indices


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_order_does_not_depend_on_the_number_of_processes(world_size, repeats):
    alone = keys(repeats=repeats)
    dealt = [
        keys(num_samples=60 // world_size, repeats=repeats, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for rank, found in enumerate(dealt):
        assert found == alone[rank::world_size]
    assert sorted(key for found in dealt for key in found) == sorted(alone)
    assert [key.position for key in alone] == list(range(60))


def test_epochs_and_seeds_have_their_own_orders():
    orders = [tuple(key.index for key in keys(seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)


def test_same_seed_and_epoch_give_the_same_order_again():
    assert keys(seed=1, epoch=5) == keys(seed=1, epoch=5)
    assert {key.epoch for key in keys(epoch=5)} == {5}


def test_repeats_put_an_image_three_times_in_a_row():
    indices = [key.index for key in keys(repeats=3)]
    assert indices[0::3] == indices[1::3] == indices[2::3]
    assert Counter(Counter(indices).values()) == {3: 20}  # a third of the 60 images, each three times


def test_repeats_follow_the_epoch_on_one_process():
    seen = [frozenset(key.index for key in keys(repeats=3, epoch=epoch)) for epoch in range(6)]
    assert len(set(seen)) == 6  # another third in each epoch
    assert set().union(*seen) > seen[0]


def test_repeats_fall_into_one_global_batch():
    """Three processes of two: a global batch is six samples in a row of the order, two images three times each."""
    dealt = [keys(num_samples=20, repeats=3, rank=rank, world_size=3) for rank in range(3)]
    for start in range(0, 20, 2):
        batch = [key.index for found in dealt for key in found[start : start + 2]]
        assert sorted(Counter(batch).values()) == [3, 3]


@pytest.mark.parametrize("start", [0, 1, 17, 20])
def test_start_leaves_out_exactly_so_many(start):
    assert keys(num_samples=20, world_size=3, rank=1, start=start) == keys(num_samples=20, world_size=3, rank=1)[start:]


def test_imagenet_on_eight_processes_has_1251_updates():
    """The official run: 1,281,167 images, 8 x 128, three repeats; whole global batches only."""
    images, ranks, batch = 1_281_167, 8, 128
    updates = images // (ranks * batch)
    assert updates == 1_251
    found = keys(images, updates * batch, repeats=3, rank=7, world_size=ranks, start=1_250 * batch)
    assert len(found) == 128  # the last update
    assert found[-1].position == 1_251 * 1_024 - 1
    assert len({key.index for key in found}) == 128  # 8 processes > 3 copies: never twice on one process
    with pytest.raises(ValueError, match="1281167 images"):
        TrainingSampler(images, (updates + 1) * batch, 1, 42, 0, ranks)


def test_more_samples_than_images_is_refused():
    with pytest.raises(ValueError, match="2 x 31 samples from 60 images"):
        TrainingSampler(60, 31, 1, 42, 0, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_images", [1, 7, 12, 360])
def test_evaluation_deals_out_every_image_once_in_the_same_batches(num_images, world_size):
    dealers = [EvaluationBatches(num_images, 5, rank, world_size) for rank in range(world_size)]
    dealt = [list(dealer) for dealer in dealers]
    assert [len(dealer) for dealer in dealers] == [len(batches) for batches in dealt]
    together = sorted(batch for batches in dealt for batch in batches)
    assert [index for batch in together for index in batch] == list(range(num_images))
    assert together == list(EvaluationBatches(num_images, 5, 0, 1))
    assert max(len(batches) for batches in dealt) - min(len(batches) for batches in dealt) <= 1


def test_evaluation_batches_can_be_read_again():
    batches = EvaluationBatches(12, 5, 0, 1)
    assert list(batches) == list(batches) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]

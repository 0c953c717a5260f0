import random

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from tnt_timm.data.datasets import open_dataset
from tnt_timm.data.loader import EvaluationSamples
from tnt_timm.data.seeding import seed_everything
from tnt_timm.data.stream_samples import StreamedSamples
from tnt_timm.data.transforms import evaluation_transform
from tnt_timm.errors import UserError

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def normalise(image):
    """By hand, in float64."""
    return (image.double() / 255 - MEAN.double()) / STD.double()


def assert_shows(image, expected):
    torch.testing.assert_close(image.double(), normalise(expected), rtol=1e-6, atol=1e-6)


def global_state():
    return random.random(), np.random.rand(), torch.rand(1).item()


# ---- training: a function of (seed, epoch, position)


@pytest.fixture(scope="module")
def first_epochs():
    """Two epochs without workers, computed by the first test that needs them."""
    return {}


@pytest.fixture
def reference(first_epochs, training_loader):
    if not first_epochs:
        loader = training_loader()
        first_epochs.update({epoch: list(loader.epoch(epoch)) for epoch in range(2)})
    return first_epochs


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_workers_or_earlier_random_numbers(workers, reference, training_loader, same_bits):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    loader = training_loader(workers=workers)
    for epoch in range(2):
        assert same_bits(list(loader.epoch(epoch)), reference[epoch])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_on_the_device_the_promises_are_the_same(workers, training_loader, device_recipe, same_bits):
    """Other workers, earlier random numbers, and a start inside an epoch change no bit."""
    whole = training_loader(**device_recipe)
    epochs = [list(whole.epoch(epoch)) for epoch in range(2)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    loader = training_loader(**device_recipe, workers=workers)
    assert same_bits(list(loader.epoch(1, start=2)), epochs[1][2:])
    assert same_bits(list(loader.epoch(0)), epochs[0])
    assert not same_bits(epochs[0], epochs[1])


def test_on_the_device_the_images_are_those_of_a_worker(training_loader, device_recipe):
    """Up to rounding: crops differ by a grey level, which some operations amplify."""
    ours, theirs = (
        torch.cat([batch.images for batch in training_loader(mixing=False, **recipe).epoch(0)])
        for recipe in (device_recipe, {})
    )
    difference = (ours - theirs).abs().mean((1, 2, 3)) * 0.225 * 255  # in grey levels
    assert difference.median() < 0.2 and (difference > 2).sum() <= 2
    assert (theirs.mean((1, 2, 3)).std() > 0.1).all()


def test_batches_are_augmented_mixed_and_erased(reference, training_loader, same_bits, plain_transform):
    """The comparisons above would be easy without anything random."""
    plain = list(training_loader(transform=plain_transform, mixing=False).epoch(0))
    augmented = list(training_loader(mixing=False).epoch(0))
    assert not same_bits(plain, augmented) and not same_bits(augmented, reference[0])
    assert [batch.targets.shape for batch in reference[0]] == [(8, 10)] * 4
    assert [batch.targets.shape for batch in plain] == [(8,)] * 4


def test_epochs_and_seeds_differ(reference, training_loader):
    other = next(training_loader(seed=43).epoch(0))
    for batch in (reference[1][0], other):
        assert not torch.equal(batch.images, reference[0][0].images)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_start_at_any_batch_and_end_early(workers, reference, training_loader, same_bits):
    loader = training_loader(workers=workers)
    for start in (1, 3):
        assert same_bits(list(loader.epoch(1, start)), reference[1][start:])
        assert same_bits(list(loader.epoch(0)), reference[0])  # the next epoch is whole again
    assert list(loader.epoch(0, start=4)) == []
    next(loader.epoch(0))
    assert same_bits(list(loader.epoch(1)), reference[1])


def test_the_generators_after_a_batch_are_a_function_of_the_key(training_loader):
    """Dropout draws from them during the step."""
    states = {}
    for workers in (0, 1):
        loader = training_loader(workers=workers)
        states[workers] = {(epoch, n): global_state() for epoch in range(2) for n, _ in enumerate(loader.epoch(epoch))}
    assert states[0] == states[1] and len(states[0]) == 8
    assert len(set(states[0].values())) == 8  # each key has its own
    for other in (training_loader(seed=43), training_loader(rank=1, world_size=2)):
        next(other.epoch(0))
        assert global_state() not in states[0].values()


def test_ranks_share_the_images(training_loader):
    """Two ranks of four see together what one of eight sees, with the same augmentation."""
    whole = training_loader(mixing=False)
    parts = [training_loader(mixing=False, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for batch, *halves in zip(whole.epoch(0), *(part.epoch(0) for part in parts)):
        for rank, half in enumerate(halves):
            assert torch.equal(half.images, batch.images[rank::2])
            assert torch.equal(half.targets, batch.targets[rank::2])


def test_repeats_show_an_image_under_different_augmentations(training_loader):
    images, targets, *_ = next(training_loader(mixing=False, batch_size=9, repeats=3).epoch(0))
    for first in (0, 3, 6):
        assert len(set(targets[first : first + 3].tolist())) == 1
        assert len({images[first + copy].numpy().tobytes() for copy in range(3)}) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_the_requested_length(workers, training_loader):
    loader = training_loader(batches_per_epoch=3, workers=workers, mixing=False, batch_size=5)
    assert [batch.images.shape for batch in loader.epoch(0)] == [(5, 3, 16, 16)] * len(loader)
    assert len(loader) == 3


# ---- on the device: normalise, mix, erase


def test_normalisation_is_exact(training_loader, plain_transform, digits):
    loader = training_loader(transform=plain_transform, mixing=False)
    indices = [key.index for key in loader.sampler]
    images, targets, *_ = next(loader.epoch(0))
    assert images.dtype is torch.float32 and targets.dtype is torch.int64
    for image, target, index in zip(images, targets, indices):
        original, expected_target = digits.load(index)
        assert_shows(image, plain_transform(original))
        assert target == expected_target


def test_order_is_normalise_mix_erase(training_loader):
    """The same by hand, from the plain batch and the batch's key."""
    mixup = Mixup(mixup_alpha=0.8, prob=1.0, num_classes=10)
    erasing = RandomErasing(1.0, mode="const", device="cpu")
    done = training_loader(mixup=mixup, erasing=erasing)
    plain = training_loader(mixing=False)
    for number, (batch, start) in enumerate(zip(done.epoch(2), list(plain.epoch(2)))):
        seed_everything(42, 2, number, 0, 1)
        images, targets = mixup(start.images.clone(), start.targets)
        assert not torch.equal(images, start.images)
        unerased = images.clone()
        images = erasing(images)
        assert torch.equal(batch.images, images) and torch.equal(batch.targets, targets)
        # Erased pixels have the mean colour: 0 after normalisation, and not mixed with another image.
        erased = (batch.images != unerased).any(dim=1)
        assert erased.flatten(1).any(dim=1).all()
        assert not batch.images.movedim(1, -1)[erased].any()


# ---- damaged images


@pytest.fixture
def damage(write_folders, open_folder):
    """damage(split, {index: kind}, cat=6, ...) -> the split, with some images of the class `cat` damaged."""

    def write(split, kinds, **classes):
        root = write_folders(**{split: classes})
        for index, kind in kinds.items():
            file = root / split / "cat" / f"{index}.jpg"
            whole = file.read_bytes()
            file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no image"}[kind])
        return open_folder(root, split)

    return write


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_training_images_are_named_and_replaced(workers, damage, training_loader, plain_transform):
    data = damage("train", {1: "truncated", 3: "empty", 4: "text"}, cat=6, dog=6)
    settings = dict(transform=plain_transform, mixing=False, batch_size=4, batches_per_epoch=3, workers=workers)
    loader = training_loader(data, **settings)
    order = [key.index for key in loader.sampler]
    batches = list(loader.epoch(0))
    assert len(batches) == 3
    for number, batch in enumerate(batches):
        wanted = order[4 * number : 4 * number + 4]
        tried = [{1: [1], 3: [3, 4], 4: [4]}.get(index, []) for index in wanted]
        assert [found.name for found in batch.damaged] == [data.name(i) for indices in tried for i in indices]
        for image, target, index in zip(batch.images, batch.targets, wanted):
            good = {1: 2, 3: 5, 4: 5}.get(index, index)  # the next readable image
            expected, expected_target = data.load(good)
            assert_shows(image, plain_transform(expected))
            assert target == expected_target
    reasons = {found.name.rpartition("/")[2]: found.reason for batch in batches for found in batch.damaged}
    assert set(reasons) == {"1.jpg", "3.jpg", "4.jpg"}
    assert "truncated" in reasons["1.jpg"].lower() and reasons["3.jpg"] == "an empty file"
    assert not any("\n" in reason for reason in reasons.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_set_without_readable_images_is_an_error_of_one_line(workers, damage, training_loader):
    data = damage("train", dict.fromkeys(range(4), "truncated"), cat=4)
    with pytest.raises(UserError) as caught:
        next(training_loader(data, batch_size=2, batches_per_epoch=2, workers=workers).epoch(0))
    message = str(caught.value)
    assert message.startswith(data.name(0)[:-5]) and "\n" not in message
    assert message.endswith("; this and the next 9 training images cannot be read")


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reports_damage_and_replaces_nothing(workers, damage, evaluation_loader):
    data = damage("validation", {0: "empty", 2: "truncated"}, cat=5, dog=2)
    batches = list(evaluation_loader(data, workers=workers))
    assert [found.name for batch in batches for found in batch.damaged] == [data.name(0), data.name(2)]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(7))
    black = normalise(torch.zeros(3, 16, 16))
    is_black = [torch.allclose(image.double(), black) for batch in batches for image in batch.images]
    assert is_black == [True, False, True, False, False, False, False]


def test_the_placeholder_of_a_damaged_image_has_the_size_of_the_others(damage):
    config = dict(input_size=(3, 96, 96), interpolation="bicubic", crop_pct=0.9, crop_mode="center")
    transform = evaluation_transform(config | dict(mean=(0.5,) * 3, std=(0.5,) * 3))
    blank, *_ = EvaluationSamples(damage("validation", {0: "text"}, cat=1), transform)[0]
    assert tuple(blank.shape) == (3, 96, 96) and blank.dtype is torch.uint8 and not blank.any()


# ---- evaluation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_each_image_once(world_size, workers, write_folders, open_folder, evaluation_loader):
    data = open_folder(write_folders(validation=dict(cat=5, dog=5)), "validation")
    seen = {}
    for rank in range(world_size):
        loader = evaluation_loader(data, rank=rank, world_size=world_size, workers=workers)
        batches = list(loader)
        assert (len(loader), loader.num_images) == (len(batches), 10)
        for images, targets, indices, damaged in batches:
            assert not damaged
            for image, target, index in zip(images, targets.tolist(), indices.tolist()):
                assert index not in seen
                seen[index] = image
                assert target == int(index >= 5)
    assert sorted(seen) == list(range(10))
    (batch,) = evaluation_loader(data, batch_size=10)
    assert all(torch.equal(batch.images[index], image) for index, image in seen.items())


def test_evaluation_samples_match_the_dataset(digits, plain_transform):
    image, target, index, damaged = EvaluationSamples(digits, plain_transform)[5]
    assert (target, index, damaged) == (digits.targets[5], 5, [])
    assert torch.equal(image, plain_transform(digits.load(5)[0]))


# ---- streams


def numbers(batch):
    """The numbers of a plain stream's samples, from their grey levels; checks the targets."""
    found = ((batch.images[:, :, 0, 0] * STD.view(3) + MEAN.view(3)) * 255 / 4).round().int()[:, 0].tolist()
    assert batch.targets.tolist() == [number % 2 for number in found]
    return found


@pytest.fixture
def stream_loader(training_loader, plain_transform):
    """stream_loader(root, ...) -> TrainingLoader over the split `train`, in batches of three."""

    def make(root, **arguments):
        stream = open_dataset("wds/set", str(root), "train", True, batch_size=3, seed=arguments.get("seed", 42))
        settings = dict(transform=plain_transform, mixing=False, batch_size=3, batches_per_epoch=6)
        return training_loader(stream, **{**settings, **arguments})

    return make


@pytest.mark.parametrize("workers", [0, 2, 5])
@pytest.mark.parametrize("split", ["validation", "set-validation-{000..002}.tar|12"])
def test_a_stream_is_evaluated_once(split, workers, write_shards, evaluation_loader):
    root = write_shards(validation=[5, 4, 3])
    loader = evaluation_loader(open_dataset("wds/set", str(root), split, False), workers=workers)
    assert (len(loader), loader.num_images) == (3, 12)
    for _ in range(2):
        batches = list(loader)
        assert sorted(number for batch in batches for number in numbers(batch)) == list(range(12))
        assert all(index == -1 for batch in batches for index in batch.indices)


def test_rank_0_alone_evaluates_a_stream(write_shards, evaluation_loader):
    root = write_shards(validation=[5, 4, 3])
    found = []
    for rank in range(2):
        stream = open_dataset("wds/set", str(root), "validation", False)
        stream.reader.dist_rank, stream.reader.dist_num_replicas = rank, 2  # timm sets them in such a run
        loader = evaluation_loader(stream, rank=rank, world_size=2)
        found.append([number for batch in loader for number in numbers(batch)])
        assert bool(len(loader)) == bool(found[rank])
    assert found == [list(range(12)), []]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [2, 6])
def test_a_stream_gives_exactly_the_batches_of_an_epoch(batches, workers, write_shards, stream_loader):
    loader = stream_loader(write_shards(train=[5, 5, 5, 5]), workers=workers, batches_per_epoch=batches)
    for epoch in range(3):
        found = list(loader.epoch(epoch))
        assert [batch.images.shape for batch in found] == [(3, 3, 16, 16)] * batches
        assert {number for batch in found for number in numbers(batch)} <= set(range(20))


def test_a_stream_shows_no_image_twice_in_an_epoch(write_shards, stream_loader):
    loader = stream_loader(write_shards(train=[5, 5, 5, 5]))
    epochs = [tuple(n for batch in loader.epoch(epoch) for n in numbers(batch)) for epoch in range(3)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert len(set(epochs)) == 3


def test_ranks_read_different_shards(write_shards, stream_loader):
    root = write_shards(train=[6, 6, 6, 6])
    parts = [stream_loader(root, rank=rank, world_size=2, batches_per_epoch=4) for rank in range(2)]
    ours, theirs = ({n for batch in part.epoch(0) for n in numbers(batch)} for part in parts)
    assert len(ours) == len(theirs) == 12 and not ours & theirs


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_with_the_same_bits(workers, write_shards, stream_loader, recipe_transform, same_bits):
    """A new loader, as after a restart, gives the rest of an epoch."""
    root = write_shards(train=[5, 5, 5, 5])
    settings = dict(workers=workers, transform=recipe_transform)
    whole = stream_loader(root, **settings)
    epochs = [list(whole.epoch(epoch)) for epoch in range(3)]
    torch.manual_seed(5)
    again = stream_loader(root, **settings)
    assert same_bits(list(again.epoch(1, start=2)), epochs[1][2:])
    assert same_bits(list(again.epoch(2)), epochs[2])
    assert not same_bits(epochs[1], epochs[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_with_the_same_bits_on_the_device(
    workers, write_shards, stream_loader, device_recipe, same_bits
):
    root = write_shards(train=[5, 5, 5, 5])
    whole = list(stream_loader(root, workers=workers, **device_recipe).epoch(1))
    assert same_bits(list(stream_loader(root, workers=workers, **device_recipe).epoch(1, start=2)), whole[2:])
    assert len({image.sum().item() for batch in whole for image in batch.images}) > 15


def test_a_stream_needs_a_shard_per_rank_and_worker(write_shards, stream_loader):
    root = write_shards(train=[5, 5, 5, 5, 5])
    assert stream_loader(root, workers=8, world_size=2).loader.num_workers == 2
    with pytest.raises(UserError, match="the stream has 5 shards for 6 ranks"):
        stream_loader(root, world_size=6)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (
            "images",
            r"set-train-000\.tar: 0000\d: this and the next 4 images of the stream cannot be read: not an image",
        ),
        ("shards", r"a shard cannot be read: .*set-train-000\.tar.*; replace it"),
    ],
)
def test_a_stream_of_damage_says_what_is_wrong(damaged, message, workers, write_shards, stream_loader):
    root = write_shards(train=[5])
    shard = root / "set-train-000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"JUNK") if damaged == "images" else b"junk" * 1000)
    with pytest.raises(UserError, match=message):
        next(stream_loader(root, workers=workers).epoch(0))


def test_a_shard_of_validation_that_cannot_be_read(write_shards, evaluation_loader):
    root = write_shards(validation=[2, 2])
    (root / "set-validation-001.tar").write_bytes(b"junk" * 1000)
    with pytest.raises(UserError, match=r"a shard cannot be read: .*set-validation-001\.tar"):
        list(evaluation_loader(open_dataset("wds/set", str(root), "validation", False)))


def test_a_stream_that_ends_early_is_an_error(write_shards, stream_loader, monkeypatch):
    loader = stream_loader(write_shards(train=[5, 5]))
    monkeypatch.setattr(StreamedSamples, "_replaced", lambda self: iter(()))
    with pytest.raises(UserError, match="the stream ended after 0 of 6 batches"):
        list(loader.epoch(0))

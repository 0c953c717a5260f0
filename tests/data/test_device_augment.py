"""Whole policies, drawn for each image and applied to a batch, against timm's."""

import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from timm.data import auto_augment, create_transform

from tnt_timm.data.augment_ops import MATRICES
from tnt_timm.data.device_augment import KINDS, DeviceAugment
from tnt_timm.data.seeding import seed_everything
from tnt_timm.data.transforms import posterize

SIZE = (48, 64)
POLICIES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m9-n3-mstd0.5",
    "rand-m7-mstd101-inc1-p0.9",
    "rand-m12-mmax15-tweights",
    "rand-m9-t3aw",
    "v0",
    "v0r",
    "original",
    "originalr",
    "3a",
    None,  # colour jitter
]


def steps(policy):
    options = dict(is_training=True, use_prefetcher=True, separate=True, mean=(0.485, 0.456, 0.406))
    return create_transform((3, *SIZE), auto_augment=policy, color_jitter=0.4, interpolation="random", **options)[
        1
    ].transforms


def timms(policy):
    """timm's steps, which do not fail for the highest magnitudes."""
    found = steps(policy)
    for step in found:
        for operations in getattr(step, "policy", [getattr(step, "ops", ())]):
            for operation in operations:
                if operation.aug_fn is auto_augment.posterize:
                    operation.aug_fn = posterize
    return found


def array(image):
    return torch.from_numpy(np.array(image))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_random_numbers_give_timms_images(policy, photograph):
    """A difference of one grey level may grow in the next operation, so a few images may differ by more."""
    image = photograph.resize(SIZE[::-1])
    reference, augment, theirs, drawn = timms(policy), DeviceAugment(steps(policy), SIZE), [], []
    for number in range(100):
        seed_everything(7, number)
        changed = image
        for step in reference:
            changed = step(changed)
        theirs.append(array(changed))
        after = random.random(), np.random.rand(), torch.rand(1)
        seed_everything(7, number)
        drawn.append(augment.draw())
        assert after == (random.random(), np.random.rand(), torch.rand(1))  # as many random numbers
    ours = augment.apply(array(image).expand(100, -1, -1, -1), torch.stack(drawn))
    difference = (torch.stack(theirs).permute(0, 3, 1, 2).int() - ours.int()).abs()
    assert (difference.amax((1, 2, 3)) > 1).sum() <= 25
    assert difference.float().mean() < 0.05
    assert (ours != array(image).permute(2, 0, 1)).flatten(1).any(1).sum() > 40


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "v0"])
def test_frequencies_and_magnitudes_of_10000_draws_are_timms(policy):
    """timm's operations are watched while it changes a tiny image. Its random numbers are others than ours."""
    seen = []
    reference = steps(policy)
    for step in reference:
        for operations in getattr(step, "policy", [getattr(step, "ops", ())]):
            for operation in operations:
                name = operation.aug_fn.__name__
                operation.aug_fn = lambda image, *numbers, name=name, **_: seen.append((name, *numbers)) or image
    for number in range(10_000):
        seed_everything(1, number)
        for step in reference:
            step(Image.new("RGB", (1, 1)))
    augment = DeviceAugment(steps(policy), SIZE)
    ours = []
    for number in range(10_000):
        seed_everything(2, number)
        for kind, _, *numbers in augment.draw().tolist():
            if kind:
                ours.append((KINDS[int(kind)].__name__, *numbers))
    theirs, mine = Counter("warp" if name in WARPS else name for name, *_ in seen), Counter(name for name, *_ in ours)
    assert set(theirs) == set(mine)
    assert chi2_contingency([[theirs[name], mine[name]] for name in theirs]).pvalue > 1e-4
    for name, number in (("color", 0), ("solarize", 0), ("shear_x", 1), ("translate_y_rel", 5)):
        amounts = [row[1] * (SIZE[0] if name == "translate_y_rel" else 1) for row in seen if row[0] == name]
        kind = "warp" if name in WARPS else name
        drawn = [row[1 + number] for row in ours if row[0] == kind and (kind == name or is_only(number, row[1:]))]
        assert policy == "v0" or len(amounts) > 300
        assert not amounts or ks_2samp(amounts, drawn).pvalue > 1e-4


WARPS = {function.__name__ for function in MATRICES}


def is_only(number, matrix):
    """Return whether a matrix is that of an image which stays, except for one number."""
    return matrix[number] != 0 and all(matrix[i] == (1, 0, 0, 0, 1, 0)[i] for i in range(6) if i != number)


def drawn_with(augment, *key):
    seed_everything(*key)
    return augment.draw()


def test_draws_are_a_function_of_the_key():
    augment = DeviceAugment(steps(POLICIES[0]), SIZE)
    first, again, other = (drawn_with(augment, *key) for key in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_each_image_gets_its_own_operations_whatever_the_batch(photograph):
    """The bits of an image do not depend on the others in its batch."""
    augment = DeviceAugment(steps(POLICIES[2]), SIZE)
    images = torch.stack([array(photograph.crop((n, n, n + 64, n + 48))) for n in range(32)])
    drawn = torch.stack([drawn_with(augment, 3, number) for number in range(32)])
    before = images.clone()
    whole = augment.apply(images, drawn)
    alone = torch.cat([augment.apply(images[n : n + 1], drawn[n : n + 1]) for n in range(32)])
    assert torch.equal(whole, alone) and torch.equal(images, before)
    unpickled = pickle.loads(pickle.dumps(augment))  # as for workers that are not forked
    assert torch.equal(drawn_with(unpickled, 3, 1), drawn[1])


@pytest.mark.cuda
def test_a_gpu_gives_the_same_images_without_waiting(photograph):
    augment = DeviceAugment(steps("rand-m9-n4-mstd101-t3aw"), SIZE)
    images = torch.stack([array(photograph.crop((n, n, n + 64, n + 48))) for n in range(64)])
    drawn = torch.stack([drawn_with(augment, 3, number) for number in range(64)])
    on_gpu = images.cuda()
    augment.apply(on_gpu, drawn)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment.apply(on_gpu, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (found.cpu().int() - augment.apply(images, drawn).int()).abs()
    assert (difference.amax((1, 2, 3)) > 1).sum() <= 8 and difference.float().mean() < 0.05


def test_nothing_drawn_changes_nothing(photograph):
    image, augment = array(photograph.resize(SIZE[::-1]))[None], DeviceAugment([], SIZE)
    assert torch.equal(augment.apply(image, augment.draw()[None]), image.permute(0, 3, 1, 2))


def test_an_operation_of_a_newer_timm_is_refused_by_name():
    policy = steps(POLICIES[0])
    policy[0].ops[3].aug_fn, policy[0].ops[3].name = (lambda image, **_: image), "Swirl"
    with pytest.raises(ValueError, match="Swirl"):
        DeviceAugment(policy, SIZE)


@pytest.mark.parametrize("policy", ["augmix-m5"])
def test_a_step_that_is_not_known_is_refused(policy):
    with pytest.raises(ValueError, match="AugMixAugment"):
        DeviceAugment(steps(policy), SIZE)


def test_jitter_of_the_hue_is_refused():
    from torchvision.transforms import ColorJitter

    with pytest.raises(ValueError, match="hue"):
        DeviceAugment([ColorJitter(0.1, 0.1, 0.1, 0.1)], SIZE)

"""Each operation for a batch against timm's on Pillow images, with the same arguments, on photographs."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment

from tnt_timm.data.augment_ops import CHANGES, FILTERS, warp
from tnt_timm.data.device_augment import DeviceAugment
from tnt_timm.data.transforms import posterize

FILL = (124, 116, 104)
EXACT = {"AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"}
GEOMETRIC = {"ShearX", "ShearY", "Rotate", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"}
MAGNITUDES = (0, 0.3, 2.5, 5, 7, 9, 9.9, 10)


@pytest.fixture(scope="module")
def photographs():
    """Two photographs, a dark one, a pale one, and one of a single colour."""
    found = [Image.fromarray(image).resize((96, 64)) for image in load_sample_images().images]
    dark, pale = found[0].point(lambda level: level // 4), found[1].point(lambda level: 200 + level // 8)
    return [*found, dark, pale, Image.new("RGB", found[0].size, (7, 130, 255))]


def tensors(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def both(name, magnitude, images, resample=Image.Resampling.BICUBIC):
    """Return the results of timm and of ours."""
    hparams = dict(translate_const=40, img_mean=FILL, interpolation=resample)
    policies = [
        auto_augment.RandAugment([auto_augment.AugmentOp(name, 1.0, magnitude, hparams)], num_layers=1)
        for _ in range(2)
    ]
    theirs, ours = [], []
    for operation in policies[0].ops:
        if operation.aug_fn is auto_augment.posterize:  # timm's fails on Pillow 13 for 0 bits
            operation.aug_fn = posterize
    for number, image in enumerate(images):
        random.seed(number)
        theirs.append(policies[0](image))
    augment = DeviceAugment(policies[1:], images[0].size[::-1])
    for number in range(len(images)):
        random.seed(number)
        ours.append(augment.draw())
    return tensors(theirs), augment.apply(tensors(images).permute(0, 2, 3, 1), torch.stack(ours))


def test_every_operation_of_timm_is_known(photographs):
    for name in auto_augment.NAME_TO_OP:
        theirs, ours = both(name, 5, photographs)
        assert ours.dtype == torch.uint8 and ours.shape == theirs.shape


@pytest.mark.parametrize("name", sorted(set(auto_augment.NAME_TO_OP) - GEOMETRIC))
def test_colours_are_timms(name, photographs):
    """Pillow blends in single precision, which compilers may fuse: at most one grey level."""
    changed = False
    for magnitude in MAGNITUDES:
        theirs, ours = both(name, magnitude, photographs)
        difference = (theirs.int() - ours.int()).abs()
        assert difference.max() <= (0 if name.removesuffix("Increasing").removesuffix("Original") in EXACT else 1)
        assert (difference > 0).float().mean() < 0.01
        changed |= bool((ours != tensors(photographs)).any())
    assert changed


@pytest.mark.parametrize("name", sorted(GEOMETRIC))
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_shapes_are_timms(name, resample, photographs):
    """Pillow interpolates in double precision and cuts off: where a value is nearly whole, one grey level less."""
    for magnitude in MAGNITUDES:
        theirs, ours = both(name, magnitude, photographs, resample)
        difference = (theirs.int() - ours.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.1


def test_pixels_from_outside_have_the_fill_colour(photographs):
    theirs, ours = both("TranslateXRel", 10, photographs)
    filled = (ours == torch.tensor(FILL).view(3, 1, 1)).all(1)
    assert filled[-1].sum() == (theirs[-1] == torch.tensor(FILL).view(3, 1, 1)).all(0).sum() > 0


def test_memory_format_does_not_matter_and_given_images_stay(photographs):
    reference = tensors(photographs).contiguous()
    images = reference.contiguous(memory_format=torch.channels_last)
    before, number = images.clone(), torch.full((len(images),), 1.3, dtype=torch.float64)
    for change in {change for change, _ in CHANGES.values()}:
        assert torch.equal(change(images, number), change(reference, number))
    matrices, fill = (
        torch.tensor([[1, 0.1, 3.3, 0.2, 1, -2]] * len(images), dtype=torch.float64),
        torch.tensor(FILL).byte(),
    )
    for resample in FILTERS:
        assert torch.equal(warp(images, matrices, resample, fill), warp(reference, matrices, resample, fill))
    assert torch.equal(images, before)

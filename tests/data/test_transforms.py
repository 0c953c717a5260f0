import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from tnt_timm.data.seeding import seed_everything
from tnt_timm.data.transforms import evaluation_transform, posterize, training_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = "rand-m9-mstd0.5-inc1"


def augmenting(policy, size=32, **settings):
    return training_transform((3, size, size), MEAN, STD, auto_augment_policy=policy, **settings)


@pytest.fixture(scope="module")
def thumbnail(photograph):
    return photograph.resize((60, 40))


@pytest.fixture(scope="module")
def gradient():
    """Every grey level once."""
    return Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")


@pytest.mark.parametrize("policy", [RECIPE, "rand-m15-n3-mstd2-inc1", "rand-m9-mstd0.5", "v0", "original", "3a"])
def test_every_draw_of_a_policy_gives_an_image(policy, thumbnail):
    """Thousands of draws: the highest magnitudes, where a fresh Pillow refuses timm's posterize, are rare."""
    transform = augmenting(policy, 16)
    for draw in range(1500):
        seed_everything(42, 0, draw)
        image = transform(thumbnail)
        assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 16, 16))


@pytest.mark.parametrize("policy", ["augmix-m10", RECIPE.replace("m9", "m10")])
def test_policies_survive_the_highest_magnitude(policy, thumbnail):
    transform = augmenting(policy, 16)
    for draw in range(300):
        seed_everything(42, 0, draw)
        assert transform(thumbnail).dtype is torch.uint8


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
def test_posterize_is_timms_where_timms_works(bits, photograph, pixels):
    ours = pixels(posterize(photograph, bits))
    assert np.array_equal(ours, pixels(auto_augment.posterize(photograph, bits)))
    assert np.array_equal(ours, pixels(photograph) & (256 - 2 ** (8 - bits)))


@pytest.mark.parametrize("bits", [0, -1])
def test_posterize_with_no_bits_left_is_black(bits, photograph, pixels):
    black = posterize(photograph, bits)
    assert (black.mode, black.size) == (photograph.mode, photograph.size)
    assert not pixels(black).any()


@pytest.mark.parametrize(
    ("policy", "name", "magnitude"),
    [
        (RECIPE, "PosterizeIncreasing", 10),
        ("rand-m9-mstd0.5", "Posterize", 0),
        ("v0", "Posterize", 0),
        ("augmix-m3", "PosterizeIncreasing", 10),
    ],
)
def test_policy_posterizes_to_black(policy, name, magnitude, photograph, pixels):
    """Notices a timm or a policy whose posterize is not mended."""
    steps = augmenting(policy).transforms
    policies = [step for step in steps if type(step).__module__ == auto_augment.__name__]
    groups = [ops for step in policies for ops in getattr(step, "policy", None) or [step.ops]]
    found = [op for ops in groups for op in ops if op.name == name]
    assert found
    for op in found:
        assert op.aug_fn is posterize
        op.magnitude, op.magnitude_std, op.prob = magnitude, 0, 1.0
        assert not pixels(op(photograph)).any()


def test_the_mend_leaves_timm_itself_alone():
    augmenting(RECIPE)
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize is not posterize


def test_same_seed_same_augmentation(thumbnail):
    transform = augmenting(RECIPE)

    def draw(*key):
        seed_everything(*key)
        return transform(thumbnail)

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    assert not torch.equal(draw(1, 2, 3), draw(1, 2, 4))


def test_no_aug_is_not_random(thumbnail):
    transform = augmenting(RECIPE, no_aug=True)
    assert all(torch.equal(transform(thumbnail), transform(thumbnail)) for _ in range(5))


def test_flips_mirror_the_image(thumbnail):
    whole = dict(scale=(1.0, 1.0), ratio=(1.5, 1.5), interpolation="bilinear", color_jitter=None)
    plain = augmenting(None, hflip=0.0, **whole)(thumbnail)
    assert torch.equal(augmenting(None, hflip=1.0, **whole)(thumbnail), plain.flip(2))
    assert torch.equal(augmenting(None, hflip=0.0, vflip=1.0, **whole)(thumbnail), plain.flip(1))


def test_scale_bounds_the_crop(gradient):
    """A crop of at most a tenth of the area cannot hold the whole range of grey levels."""
    settings = dict(hflip=0.0, color_jitter=None, interpolation="bilinear")
    small = augmenting(None, scale=(0.05, 0.1), **settings)
    whole = augmenting(None, scale=(1.0, 1.0), ratio=(1.0, 1.0), **settings)
    assert int(whole(gradient).max()) - int(whole(gradient).min()) > 240
    for _ in range(20):
        crop = small(gradient)
        assert int(crop.max()) - int(crop.min()) < 150


def test_unknown_policy_is_refused():
    with pytest.raises((AssertionError, KeyError)):
        augmenting("rendaugment-m9")


def evaluating(size, crop_pct, crop_mode="center", interpolation="bicubic"):
    shape = (3, size, size)
    return evaluation_transform(
        dict(input_size=shape, interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop_pct, crop_mode=crop_mode)
    )


def test_evaluation_resizes_to_248_and_crops_224(photograph, pixels):
    """By hand: 640x427 -> 371x248, of which the middle 224x224."""
    resized = photograph.resize((371, 248), Image.Resampling.BICUBIC)
    by_hand = pixels(resized.crop((74, 12, 74 + 224, 12 + 224)))
    found = evaluating(224, 0.9)(photograph)
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (3, 224, 224))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), by_hand)


def test_evaluation_at_384_without_margin(photograph, pixels):
    resized = photograph.resize((575, 384), Image.Resampling.BILINEAR)
    by_hand = pixels(resized.crop((96, 0, 96 + 384, 384)))
    assert np.array_equal(evaluating(384, 1.0, interpolation="bilinear")(photograph).permute(1, 2, 0).numpy(), by_hand)


def test_evaluation_can_squash(photograph, pixels):
    by_hand = pixels(photograph.resize((64, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(evaluating(64, 1.0, "squash")(photograph).permute(1, 2, 0).numpy(), by_hand)


def test_evaluation_ignores_the_rest_of_a_data_config(photograph):
    config = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=0.9, crop_mode="center")
    assert torch.equal(evaluation_transform({**config, "num_classes": 5})(photograph), evaluating(32, 0.9)(photograph))

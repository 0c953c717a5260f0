import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from tnt_timm.data.seeding import seed_everything
from tnt_timm.data.transforms import evaluation_transform, posterize, split_training_transform, training_transform

NORMALISATION = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
RECIPE = "rand-m9-mstd0.5-inc1"


def augmenting(policy, size=32, **settings):
    return training_transform((3, size, size), **NORMALISATION, auto_augment_policy=policy, **settings)


@pytest.fixture(scope="module")
def thumbnail(photograph):
    return photograph.resize((60, 40))


@pytest.fixture(scope="module")
def gradient():
    """Every grey level once."""
    return Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")


@pytest.mark.parametrize(
    ("policy", "draws"),
    [
        *((policy, 1500) for policy in (RECIPE, "rand-m15-n3-mstd2-inc1", "rand-m9-mstd0.5", "v0", "original", "3a")),
        *((policy, 300) for policy in ("augmix-m10", RECIPE.replace("m9", "m10"))),
    ],
)
def test_every_draw_of_a_policy_gives_an_image(policy, draws, thumbnail):
    """Many draws: the highest magnitudes, where Pillow 13 refuses timm's posterize, are rare."""
    transform = augmenting(policy, 16)
    for draw in range(draws):
        seed_everything(42, 0, draw)
        image = transform(thumbnail)
        assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 16, 16))


@pytest.mark.parametrize("bits", [-1, 0, 1, 2, 4, 7, 8])
def test_posterize_is_timms_but_black_without_bits(bits, photograph):
    ours = posterize(photograph, bits)
    assert (ours.mode, ours.size) == (photograph.mode, photograph.size)
    assert np.array_equal(np.asarray(ours), np.asarray(photograph) & (256 - 2 ** (8 - max(bits, 0))))
    if bits > 0:
        assert np.array_equal(np.asarray(ours), np.asarray(auto_augment.posterize(photograph, bits)))


@pytest.mark.parametrize(
    ("policy", "name", "magnitude"),
    [
        (RECIPE, "PosterizeIncreasing", 10),
        ("rand-m9-mstd0.5", "Posterize", 0),
        ("v0", "Posterize", 0),
        ("augmix-m3", "PosterizeIncreasing", 10),
    ],
)
def test_policy_posterizes_to_black(policy, name, magnitude, photograph):
    """Fails for a timm or a policy whose posterize is not replaced."""
    steps = augmenting(policy).transforms
    policies = [step for step in steps if type(step).__module__ == auto_augment.__name__]
    groups = [ops for step in policies for ops in getattr(step, "policy", None) or [step.ops]]
    found = [op for ops in groups for op in ops if op.name == name]
    assert found
    for op in found:
        assert op.aug_fn is posterize
        op.magnitude, op.magnitude_std, op.prob = magnitude, 0, 1.0
        assert not np.asarray(op(photograph)).any()


def test_timm_itself_is_not_changed():
    augmenting(RECIPE)
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize is not posterize


def test_augmentation_follows_the_seed(thumbnail):
    transform, plain = augmenting(RECIPE), augmenting(RECIPE, no_aug=True)

    def draw(*key):
        seed_everything(*key)
        return transform(thumbnail)

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    assert not torch.equal(draw(1, 2, 3), draw(1, 2, 4))
    assert all(torch.equal(plain(thumbnail), plain(thumbnail)) for _ in range(5))


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


@pytest.mark.parametrize("interpolation", ["random", "bilinear", "bicubic"])
def test_both_parts_together_give_the_images_of_the_whole(interpolation, photograph):
    options = dict(auto_augment_policy=RECIPE, interpolation=interpolation, hflip=0.5, vflip=0.3)
    whole = augmenting(size=64, policy=RECIPE, interpolation=interpolation, hflip=0.5, vflip=0.3)
    first, augment = split_training_transform((3, 64, 64), **NORMALISATION, **options)
    as_tensor = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    theirs, ours, crops = [], [], []
    for seed in range(40):
        seed_everything(seed)
        theirs.append(torch.as_tensor(whole(photograph)))
        seed_everything(seed)
        crops.append(first(as_tensor))
        drawn = augment.draw()
        ours.append(augment.apply(crops[-1][None], drawn[None])[0])
        seed_everything(seed)
        assert crops[-1].is_contiguous()  # or else batches would be stacked slowly
        assert torch.equal(first(photograph), crops[-1])  # Pillow's images are taken as well
    difference = (torch.stack(ours).int() - torch.stack(theirs).int()).abs().float()
    assert difference.mean((1, 2, 3)).median() < 0.1
    unchanged = [torch.equal(our, crop.permute(2, 0, 1)) for our, crop in zip(ours, crops)]
    assert 4 < sum(unchanged) < 36
    assert (difference[unchanged] > 1).float().mean() < 0.001  # resizing on tensors rounds differently


def test_an_image_of_a_few_pixels_has_crops_without_any():
    first, _ = split_training_transform((3, 32, 32), **NORMALISATION)
    whole = augmenting(None, color_jitter=None)
    for seed in range(60):
        seed_everything(seed)
        theirs = torch.as_tensor(whole(Image.new("RGB", (1, 1), (9, 8, 7))))
        seed_everything(seed)
        ours = first(Image.new("RGB", (1, 1), (9, 8, 7)))
        assert torch.equal(ours, theirs.permute(1, 2, 0)) and ours.is_contiguous()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(auto_augment_policy="augmix-m5"), "AugMix"),
        (dict(color_jitter=(0.1, 0.1, 0.1, 0.1)), "hue"),
        (dict(interpolation="lanczos"), "lanczos"),
        (dict(interpolation="nearest"), "nearest"),
    ],
)
def test_what_the_device_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        split_training_transform((3, 32, 32), **NORMALISATION, **settings)


def test_unknown_policy_is_refused():
    with pytest.raises((AssertionError, KeyError)):
        augmenting("rendaugment-m9")


@pytest.mark.parametrize(
    ("size", "crop_pct", "crop_mode", "interpolation", "resized", "corner"),
    [
        (224, 0.9, "center", "bicubic", (371, 248), (74, 12)),  # 640x427 -> 371x248, the middle 224x224 of it
        (384, 1.0, "center", "bilinear", (575, 384), (96, 0)),
        (64, 1.0, "squash", "bicubic", (64, 64), (0, 0)),
    ],
)
def test_evaluation_by_hand(size, crop_pct, crop_mode, interpolation, resized, corner, photograph):
    config = dict(input_size=(3, size, size), interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode)
    found = evaluation_transform({**config, **NORMALISATION, "num_classes": 5})(photograph)  # the last has no effect
    whole = photograph.resize(resized, Image.Resampling[interpolation.upper()])
    by_hand = whole.crop((*corner, corner[0] + size, corner[1] + size))
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (3, size, size))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(by_hand))

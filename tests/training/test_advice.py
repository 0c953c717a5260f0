"""What a run says of its machine when it starts, and of a GPU that waits for images."""

from types import SimpleNamespace

import pytest
import torch

from tnt_timm.settings import config
from tnt_timm.training import advice
from tnt_timm.training.build import can_move_to_device

RECIPE = dict(input_size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
RANDAUGMENT = "--aa rand-m9-mstd0.5-inc1"
MACHINE = dict(workers=8, ranks=1, cores=8, batch_bytes=1000)  # one worker per core


def resolved(flags):
    return config.resolve(["--data-dir", "images", *flags.split()])[0]


def on(device):
    return SimpleNamespace(device=torch.device(device), size=1, gather=lambda value: [value])


@pytest.mark.parametrize(
    ("flags", "moves"),
    [
        (RANDAUGMENT, True),
        ("--color-jitter 0.4", True),
        ("--color-jitter 0", False),
        (f"{RANDAUGMENT} --augment-on device", False),
        (f"{RANDAUGMENT} --no-aug", False),
        (f"{RANDAUGMENT} --train-interpolation lanczos", False),
        ("--aa augmix-m5", False),
    ],
)
def test_a_gpu_that_waits_is_offered_only_what_works(flags, moves):
    settings, parts = resolved(flags), SimpleNamespace(preprocessing=RECIPE, train_set=())
    assert can_move_to_device(settings.augmentation, RECIPE) == moves
    expected = "try --augment-on device" if moves else "more CPU cores would help"
    assert advice.remedy_for_waiting(settings, parts, on("cuda"), MACHINE) == expected
    assert advice.remedy_for_waiting(settings, parts, on("cpu"), MACHINE) == ""


@pytest.mark.parametrize(
    ("device", "flags", "warned"), [("cpu", "device", 1), ("cpu", "worker", 0), ("cuda", "device", 0)]
)
def test_the_slower_augmentation_for_a_cpu_is_said(device, flags, warned):
    settings = resolved(f"{RANDAUGMENT} --augment-on {flags}")
    loader = SimpleNamespace(images=())
    found = list(advice.warnings(settings, SimpleNamespace(train_set=(), eval_loader=loader), on(device), MACHINE))
    assert len(found) == warned and all("--augment-on worker is faster" in line for line in found)


def test_resources_of_other_machines_do_not_count():
    here = on("cpu")
    here.gather = lambda value: [value, ("another", {90, 91}), (value[0], {92})]
    found = advice.resources(resolved("--batch-size 6 --workers 3"), SimpleNamespace(preprocessing=RECIPE), here)
    alone = advice.resources(resolved("--batch-size 6"), SimpleNamespace(preprocessing=RECIPE), on("cpu"))
    assert found["cores"] == alone["cores"] + 1
    assert (found["workers"], found["ranks"], found["batch_bytes"]) == (3, 1, 6 * 3 * 224 * 224)

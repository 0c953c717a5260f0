"""What a run says beside its numbers."""

from types import SimpleNamespace

import pytest
import torch

from tnt_timm.training.reporting import Reporter

ROW = dict(epoch=0, train_loss=1.0, eval_loss=1.0, eval_top1=50.0, lr=1e-3)


@pytest.mark.parametrize(
    ("device", "on_device", "wait", "remedy"),
    [
        ("cuda", False, 0.3, "idle cores, or try --augment-on device\n"),
        ("cuda", True, 0.3, "idle cores\n"),
        ("cuda", False, 0.1, None),
        ("cpu", False, 0.3, None),
    ],
)
def test_a_gpu_that_waits_for_images_is_said_once(device, on_device, wait, remedy, capsys):
    config = SimpleNamespace(
        run=SimpleNamespace(log_interval=1), augmentation=SimpleNamespace(on_device=on_device, no_aug=False)
    )
    report = Reporter(config, SimpleNamespace(is_main=True, device=torch.device(device)), 2, 1)
    for _ in range(2):
        report.end_epoch(ROW, dict(accuracy=50.0, images_per_s=1.0, data_wait=wait), 50.0, 1.0)
    out = capsys.readouterr().out
    assert out.count("the GPU waits for the workers 30 % of the time") == (remedy is not None)
    assert (remedy or "epoch 1/2") in out

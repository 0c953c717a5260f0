"""What a run says beside its numbers."""

from types import SimpleNamespace

import pytest

from tnt_timm.training.reporting import Reporter

ROW = dict(epoch=0, train_loss=1.0, eval_loss=1.0, eval_top1=50.0, lr=1e-3)


@pytest.mark.parametrize(
    ("remedy", "wait", "said"), [("try this", 0.3, True), ("try this", 0.1, False), ("", 0.3, False)]
)
def test_a_gpu_that_waits_for_images_is_said_once(remedy, wait, said, capsys):
    config = SimpleNamespace(run=SimpleNamespace(log_interval=1))
    report = Reporter(config, SimpleNamespace(is_main=True), 2, 1, remedy)
    for _ in range(2):
        report.end_epoch(ROW, dict(accuracy=50.0, images_per_s=1.0, data_wait=wait), 50.0, 1.0)
    out = capsys.readouterr().out
    assert out.count("warning: the GPU waits for images 30 % of the time; try this\n") == said
    assert "epoch 1/2" in out

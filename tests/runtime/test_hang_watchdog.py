"""A process that makes no progress prints where it stands."""

import time

from tnt_timm.runtime.hang_watchdog import Watchdog


def stand_still(seconds: float) -> None:
    time.sleep(seconds)


def test_a_step_that_hangs_is_shown_with_its_stack_and_again_after_a_while(capfd):
    with Watchdog("rank 3", 0.1).watching():
        stand_still(0.35)
    err = capfd.readouterr().err
    assert err.count("warning: rank 3: no step for ") >= 2, err
    assert "in stand_still" in err and "test_hang_watchdog.py" in err


def test_steps_in_time_print_nothing(capfd):
    watchdog = Watchdog("rank 0", 1.0)
    with watchdog.watching():
        for _ in range(13):
            stand_still(0.1)
            watchdog.feed()
    assert capfd.readouterr().err == ""


def test_a_run_that_hangs_prints_where(train, monkeypatch):
    from tnt_timm.training import trainer

    def hangs(*args):
        time.sleep(0.4)
        return real(*args)

    real = trainer.dispatch_clip_grad
    monkeypatch.setattr(trainer, "dispatch_clip_grad", hangs)
    argv = [
        "-b",
        "24",
        "--epochs",
        "1",
        "--workers",
        "0",
        "--clip-grad",
        "1",
        "--warmup-epochs",
        "0",
        "--cooldown-epochs",
        "0",
    ]
    out, _ = train(*argv, "--hang-minutes", 0.2 / 60)
    assert "warning: rank 0: no step for 0 s; current stacks:" in out.err
    assert "in hangs" in out.err and "in train_step" in out.err

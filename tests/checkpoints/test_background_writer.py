"""The background writer: one job at a time, and its copies do not change with the originals."""

import os
import threading
import time

import torch

from tnt_timm.checkpoints.background_writer import BackgroundWriter, copied
from tnt_timm.errors import UserError


def test_training_continues_while_a_job_runs_and_the_next_job_waits_for_it():
    writer, may_end, log = BackgroundWriter(), threading.Event(), []

    def slow() -> None:
        log.append("first begins")
        may_end.wait(10)
        log.append("first ends")

    writer.start(slow)
    log.append("training continues")
    threading.Timer(0.1, may_end.set).start()
    start = time.perf_counter()
    writer.start(lambda: log.append("second"))
    assert 0.05 < time.perf_counter() - start < 10
    writer.wait()
    assert sorted(log[:2]) == ["first begins", "training continues"] and log[2:] == ["first ends", "second"]


def test_two_jobs_never_run_at_once():
    writer, running, most = BackgroundWriter(), [0], [0]

    def job() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.001)
        running[0] -= 1

    for _ in range(50):
        writer.start(job)
    writer.wait()
    assert most == [1]


def test_an_error_is_returned_once_and_does_not_stop_the_next_job():
    writer, done = BackgroundWriter(), []

    def fail() -> None:
        raise UserError("the disk is full")

    writer.start(fail)
    writer.start(lambda: done.append(1))
    assert str(writer.wait()) == "the disk is full" and writer.wait() is None and done == [1]


def test_any_exception_is_kept():
    writer = BackgroundWriter()
    writer.start(lambda: {}["key"])
    assert str(writer.wait()) == "no checkpoint was written: KeyError: 'key'"


def test_a_run_with_a_lower_priority_writes_as_well(monkeypatch):
    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    writer, done = BackgroundWriter(), []
    monkeypatch.setattr(os, "setpriority", refuse)
    writer.start(lambda: done.append(1))
    assert writer.wait() is None and done == [1]


def test_a_copy_does_not_change_with_the_original():
    weight = torch.ones(3, requires_grad=True)
    state = {"weights": {"a": weight}, "groups": [{"params": [0, 1], "betas": (0.9, 0.99)}], "step": torch.tensor(1.0)}
    copy = copied(state)
    with torch.no_grad():
        weight.zero_()
    state["groups"][0]["params"].append(2)
    state["step"] += 1
    assert torch.equal(copy["weights"]["a"], torch.ones(3)) and not copy["weights"]["a"].requires_grad
    assert copy["groups"] == [{"params": [0, 1], "betas": (0.9, 0.99)}] and copy["step"] == 1

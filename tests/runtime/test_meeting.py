"""What ranks tell each other before they compute: errors, differences, departures, and for whom they wait. Ranks are threads."""

import signal
import threading
import time

import pytest
import torch.distributed as dist

from tnt_timm.errors import ConfigError, Stopped, UserError
from tnt_timm.runtime import meeting as meeting_module
from tnt_timm.runtime.launch import Launch
from tnt_timm.runtime.meeting import Meeting, OtherRankFailed


def on_ranks(size, work):
    """Call work(meeting) for each rank; return results or exceptions."""
    store, found = dist.HashStore(), [None] * size

    def call(rank):
        meeting = Meeting(Launch(rank, size, rank, "127.0.0.1", 29500), store)
        try:
            found[rank] = work(meeting)
        except BaseException as error:
            meeting.leave(error)
            found[rank] = error

    threads = [threading.Thread(target=call, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def test_each_rank_gets_the_values_of_all():
    assert on_ranks(3, lambda meeting: (meeting.gather(meeting.rank), meeting.same(5))) == [([0, 1, 2], True)] * 3


@pytest.mark.parametrize("error", [UserError("no data"), ConfigError("no data")])
@pytest.mark.parametrize("failing, text", [((1,), "rank 1: no data"), ((0, 1), "no data"), ((1, 2), "rank 1: no data")])
def test_an_error_of_the_user_is_raised_on_every_rank(error, failing, text):
    def work(meeting):
        with meeting.together(), meeting.together():
            if meeting.rank in failing:
                raise error

    found = on_ranks(3, work)
    assert [(type(each), str(each)) for each in found] == [(UserError, text)] * 3
    assert all(each.exit_code == error.exit_code and each.everywhere for each in found)


def test_a_bug_is_raised_where_it_is_and_the_others_end():
    def work(meeting):
        with meeting.together(), meeting.together():
            if meeting.rank == 1:
                raise KeyError("no such key")
            if meeting.rank == 2:
                raise UserError("no data")

    first, bug, third = on_ranks(3, work)
    assert isinstance(bug, KeyError)
    assert all(isinstance(each, OtherRankFailed) and "rank 1: 'no such key'" in str(each) for each in (first, third))


@pytest.mark.parametrize(
    "facts, error",
    [
        ([{"lr": 0.001}, {"lr": 0.01}], "rank 1: lr 0.01 instead of 0.001; do so"),
        ([{"lr": 0.01}, {"lr": 0.001}, {"lr": 0.001}], "rank 0: lr 0.01 instead of 0.001; do so"),
        ([{"a": 1}, {"a": 2}, {"a": 1}, {"a": 2}, {"a": 1}], "ranks 1, 3: a 2 instead of 1; do so"),
        ([{"a": [1, 2]}, {"b": None}], "rank 1: a nothing instead of [1, 2]; rank 1: b None instead of nothing; do so"),
        ([{"opt": "adamw"}, {"opt": "sgd"}], "rank 1: opt 'sgd' instead of 'adamw'; do so"),
        (
            [{str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)}],
            "; rank 1: 4 1 instead of 0; and 4 more differences; do so",
        ),
    ],
)
def test_what_differs_is_named(facts, error):
    found = on_ranks(len(facts), lambda meeting: meeting.agree(facts[meeting.rank], "do so"))
    assert all(isinstance(each, ConfigError) and each.everywhere and str(each).endswith(error) for each in found)
    assert len({str(each) for each in found}) == 1


@pytest.mark.parametrize(
    "departure, kind, text",
    [
        (SystemExit(0), OtherRankFailed, "rank 1: it has ended"),
        (RuntimeError("bad luck"), OtherRankFailed, "rank 1: bad luck"),
        (Stopped(signal.SIGTERM), Stopped, "stopped by SIGTERM: progress is saved; run the same command to resume"),
    ],
)
def test_a_rank_that_leaves_is_not_waited_for(departure, kind, text):
    def work(meeting):
        if meeting.rank == 1:
            raise departure
        meeting.gather(0)

    start = time.monotonic()
    assert [(type(each), str(each)) for each in on_ranks(2, work)[:1]] == [(kind, text)]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("way", ["gather", "naming"])
def test_the_first_of_those_that_wait_says_for_whom(monkeypatch, capsys, way):
    monkeypatch.setattr(meeting_module, "SAY_AFTER_S", 0.1)
    for name, value in dict(RANK="0", WORLD_SIZE="4").items():
        monkeypatch.setenv(name, value)

    def work(meeting):
        if meeting.rank in (1, 3):
            time.sleep(0.5)
        if way == "gather":
            meeting.gather(0)
        else:
            with meeting.naming_the_missing():
                time.sleep(0.3)

    on_ranks(4, work)
    remedy = "start all 4, or `unset RANK WORLD_SIZE` to run alone"
    assert capsys.readouterr().err == f"rank 0 waits for ranks 1, 3 at 127.0.0.1:29500; {remedy}\n"


def test_nobody_at_the_address(monkeypatch, capsys, unused_port):
    monkeypatch.setattr(meeting_module, "SAY_AFTER_S", 0.1)
    launch = Launch(1, 2, 1, "127.0.0.1", unused_port, by_torchrun=True)
    with pytest.raises(UserError, match=f"^127.0.0.1:{unused_port}: rank 0 did not come .*Connection refused"):
        meeting_module._wait_for_host(launch, 0.5)
    line = rf"rank 1 waits for rank 0 at 127.0.0.1:{unused_port} ([Errno 111] Connection refused); see their output"
    assert capsys.readouterr().err == line + "\n"


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

"""Signals that stop a run: recorded where work would be lost, obeyed immediately where none would."""

import os
import signal
import time

import pytest

from tnt_timm.errors import Stopped
from tnt_timm.runtime.signals import SIGNALS, StopRequest


@pytest.fixture
def stop():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else it stays ignored under nohup
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopRequest()
    with stop.listening():
        yield stop
    for number, handler in handlers.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # the handler runs between two instructions of Python


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_recorded_and_work_continues(stop, number):
    assert not stop
    send(number)
    assert stop and stop.signal == number
    with pytest.raises(Stopped) as stopped:
        stop.obey()
    assert stopped.value.exit_code == (130 if number == signal.SIGINT else 75)


def test_a_second_ctrl_c_does_not_wait(stop):
    send(signal.SIGINT)
    with pytest.raises(Stopped):
        send(signal.SIGINT)
    assert stop.impatient
    send(signal.SIGINT)  # a third one does not disturb the process, which is already exiting


@pytest.mark.parametrize("numbers", [(signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGTERM)])
def test_a_launcher_and_a_scheduler_may_both_ask(stop, numbers):
    for number in numbers:
        send(number)
    assert stop


def test_where_nothing_is_lost_the_work_ends_immediately(stop):
    with pytest.raises(Stopped):
        with stop.ending_at_once():
            send(signal.SIGTERM)
            raise AssertionError("the work continued")
    assert not stop.at_once and not stop.impatient


def test_a_request_from_before_is_obeyed_there(stop):
    send(signal.SIGTERM)
    with pytest.raises(Stopped):
        with stop.ending_at_once():
            raise AssertionError("the work began")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_request_that_python_swallows_is_obeyed_at_the_end(stop):
    """Python swallows exceptions in __del__ and in callbacks of os.fork, which starts the workers."""

    class Swallows:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    continued = False
    with pytest.raises(Stopped):
        with stop.ending_at_once():
            Swallows()
            continued = True
    assert continued


def test_a_child_without_handlers_of_its_own_ignores_the_signal(stop):
    pid = os.fork()
    if pid == 0:
        with stop.ending_at_once():
            send(signal.SIGTERM)
        os._exit(0 if not stop else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_afterwards_handlers_are_as_before_unless_the_process_is_exiting():
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGHUP, before)
    stop = StopRequest()
    with stop.listening():
        assert signal.getsignal(signal.SIGTERM) == stop.note
    assert signal.getsignal(signal.SIGTERM) == before
    with stop.listening():
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * len(SIGNALS)
    for number in SIGNALS:
        signal.signal(number, before if number != signal.SIGINT else signal.default_int_handler)


def test_a_closed_terminal_does_not_stop_a_run_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    with stop.listening():
        send(signal.SIGHUP)
    assert not stop and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)

"""Where the ranks meet before they compute together: each writes into one store, and reads what the others wrote.

Unlike a collective operation of torch.distributed, waiting here obeys signals, names the ranks that are missing, and ends as soon
as another rank has left.
"""

import contextlib
import hashlib
import os
import pickle
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from datetime import timedelta
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence

import torch.distributed as dist

from tnt_timm.console import write_line
from tnt_timm.errors import ConfigError, Stopped, UserError, one_line
from tnt_timm.runtime.background_thread import beside
from tnt_timm.runtime.launch import ALONE, Launch, unset_all

PATIENCE = timedelta(hours=1)  # for each other: rank 0 may be writing a large checkpoint or reading a whole stream
CONNECT_S = 900.0  # for a rank to appear: its machine may still be loading a container
POLL_S = 0.02
SAY_AFTER_S, SAY_EVERY_S = 10.0, 60.0  # when a waiting rank says for whom it waits
TORCHRUN_GONE_S = 8.0  # torchrun opens its store before it starts the ranks, so one that refuses connections is gone
LEFT = "left"  # key of the store: why a rank has left before the others
FEW = 5  # differences that an error message lists


class OtherRankFailed(RuntimeError):
    """Another rank has ended, so this one cannot continue. The other rank shows the cause."""

    everywhere = True  # no rank waits to be told


class Agreement:
    """What ranks can do with `gather`. A subclass has `rank`, `size` and `gather`."""

    rank: int
    size: int

    def gather(self, value: Any) -> List[Any]:
        """Return every rank's value, in the order of ranks."""
        raise NotImplementedError

    def gather_slow(self, value: Any) -> List[Any]:
        """Do the same after work that may take long on some ranks."""
        return self.gather(value)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def same(self, value: Any) -> bool:
        """Return whether the value is equal on every rank."""
        return all(other == value for other in self.gather(value))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise the UserError of any rank on every rank, so that no rank waits for one that failed.

        Any other exception is raised where it occurs, and as OtherRankFailed on the other ranks.
        """
        mine: Optional[Exception] = None
        try:
            yield
        except Exception as error:
            if self.size == 1 or getattr(error, "everywhere", False):
                raise
            mine = error
        found = self.gather_slow(None if mine is None else (str(mine), getattr(mine, "exit_code", None)))
        failed = {rank: failure for rank, failure in enumerate(found) if failure is not None}
        if not failed:
            return
        bugs = [rank for rank, (_, exit_code) in failed.items() if exit_code is None]
        rank = (bugs or list(failed))[0]
        text, exit_code = failed[rank]
        if self.rank in bugs:
            mine.everywhere = True  # for a `together` around this one
            raise mine
        if bugs:
            raise OtherRankFailed(f"rank {rank}: {text}") from None
        error = UserError(f"rank {rank}: {text}" if rank > 0 else text, everywhere=True)
        error.exit_code = exit_code
        raise error from None

    def on_main(self, work: Callable[[], object]) -> None:
        """Call `work` on rank 0. If it raises a UserError, every rank does."""
        with self.together():
            if self.is_main:
                work()

    def agree(self, facts: Mapping[str, Any], remedy: str) -> None:
        """Check that all ranks were told the same.

        Args:
            facts: what must be the same, by name; compared by `repr`.
            remedy: what to do if something differs.

        Raises:
            ConfigError: a fact differs. The message names the ranks that differ from most others, and their values.
        """
        found = self.gather({name: repr(value) for name, value in facts.items()})
        lines = [line for name in dict.fromkeys(name for each in found for name in each) for line in _odd(name, found)]
        if lines:
            more = f"; and {len(lines) - FEW} more differences" if len(lines) > FEW else ""
            error = ConfigError(f"{'; '.join(lines[:FEW])}{more}; {remedy}")
            error.everywhere = True
            raise error


def _odd(name: str, found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield a line for each value of a fact that differs from the most frequent one."""
    values = [each.get(name, "nothing") for each in found]
    usual = Counter(values).most_common(1)[0][0]  # the first of several: that of the lowest rank
    for value in dict.fromkeys(values):
        if value != usual:
            ranks = [rank for rank, other in enumerate(values) if other == value]
            yield f"{name_ranks(ranks)}: {name} {_short(value)} instead of {_short(usual)}"


def _short(value: str) -> str:
    return value if len(value) <= 80 else value[:77] + "..."


def name_ranks(ranks: Sequence[int]) -> str:
    """Return "rank 1", "ranks 1, 3", or for many "ranks 1, 2, 3 and 61 others"."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} others" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


class Meeting(Agreement):
    """The ranks of a run, which exchange small values through a store.

    Args:
        launch: this rank among all.
        store: shared by all ranks of this start. None for a single rank.
    """

    def __init__(self, launch: Launch = ALONE, store: Optional[dist.Store] = None):
        self.launch = launch
        self.rank, self.size = launch.rank, launch.size
        self.store = store
        self.rounds = 0
        self.has_left = False

    def gather(self, value: Any) -> List[Any]:
        """Return every rank's value, in the order of ranks.

        Raises:
            OtherRankFailed: another rank has left, or hosted the store and is gone.
            Stopped: another rank was stopped by a signal.
        """
        if self.store is None:
            return [value]
        keys = self._next_keys("value")
        try:
            self.store.set(keys[self.rank], pickle.dumps(value))
            found = _wait_for(self.store, keys, PATIENCE.total_seconds(), self.launch, self._check_left)
        except dist.DistError as error:  # the store is gone, with the process that hosts it
            raise OtherRankFailed(one_line(error, 80)) from None
        return [pickle.loads(value) for value in found]

    def leave(self, error: BaseException) -> None:
        """Tell the others that this rank ends, and why, so that they need not wait for it."""
        if self.store is None or self.has_left or isinstance(error, OtherRankFailed):
            return
        self.has_left = True
        text = one_line(error, 80) if isinstance(error, Exception) else "it has ended"
        with contextlib.suppress(RuntimeError):
            self.store.set(LEFT, pickle.dumps((self.rank, text, getattr(error, "number", None))))

    def explain_loss(self, error: Exception) -> BaseException:
        """Return why a rank is gone, for an error that only says that it is: what it told before it left, if it could."""
        with contextlib.suppress(RuntimeError):
            for _ in range(25):  # it may tell just after its connections have closed
                self._check_left()
                time.sleep(POLL_S)
        return OtherRankFailed(one_line(error, 80))

    def _check_left(self) -> None:
        if self.store.check([LEFT]):
            rank, text, number = pickle.loads(self.store.get(LEFT))
            if number is not None:
                raise Stopped(number)
            raise OtherRankFailed(f"rank {rank}: {text}")

    @contextlib.contextmanager
    def naming_the_missing(self) -> Iterator[None]:
        """While the context waits for all ranks in another way than through the store, say now and then who is missing."""
        if self.store is None:
            yield
            return
        keys = self._next_keys("here")
        with contextlib.suppress(RuntimeError):  # the store may be gone with its host: only these lines would need it
            self.store.set(keys[self.rank], b"")
        with beside("waiting for ranks", self._say_who_is_missing, keys):
            yield

    def _say_who_is_missing(self, keys: List[str], done: threading.Event) -> None:
        if done.wait(SAY_AFTER_S):
            return
        with contextlib.suppress(RuntimeError):
            while True:
                _say_missing(self.store, keys, self.launch)
                if done.wait(SAY_EVERY_S):
                    return

    def _next_keys(self, what: str) -> List[str]:
        self.rounds += 1
        return [f"{what} {self.rounds} of {rank}" for rank in range(self.size)]


@contextlib.contextmanager
def meet(launch: Launch) -> Iterator[Meeting]:
    """Bring the ranks together for the duration of the context. If it ends with an exception, the others are told.

    Raises:
        UserError: a rank does not come.
    """
    meeting = Meeting(launch, _open_store(launch)) if launch.size > 1 else Meeting(launch)
    try:
        yield meeting
    except BaseException as error:
        meeting.leave(error)
        raise


def _open_store(launch: Launch) -> dist.Store:
    """Return a store for the ranks of this start, without the entries of processes that have died.

    torchrun keeps one store for its whole life, so after a restart a rank may wait at the address of a dead process
    (pytorch/pytorch#135712). No variable of torchrun's is both equal on all nodes and new at each start. So each rank
    writes a random name; the store's prefix is a hash of all names, used once every rank has seen the same ones.
    """
    store = _connect(launch)
    store.set(f"name of {launch.rank}", uuid.uuid4().hex)
    deadline = time.monotonic() + CONNECT_S
    while time.monotonic() < deadline:
        names = b" ".join(_wait_for(store, [f"name of {other}" for other in range(launch.size)], CONNECT_S, launch))
        store.set(f"seen by {launch.rank}", names)
        if set(_wait_for(store, [f"seen by {other}" for other in range(launch.size)], CONNECT_S, launch)) == {names}:
            return dist.PrefixStore(hashlib.sha256(names).hexdigest(), store)
        time.sleep(POLL_S)
    raise UserError(
        f"{launch.address}:{launch.port}: a rank of this start did not come within {CONNECT_S / 60:.0f} minutes"
    )


def _connect(launch: Launch) -> dist.TCPStore:
    hosted_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = launch.rank == 0 and not hosted_by_torchrun
    if not is_host:
        _wait_for_host(launch, TORCHRUN_GONE_S if hosted_by_torchrun else CONNECT_S)
    options = dict(is_master=is_host, timeout=PATIENCE, wait_for_workers=False)
    try:
        return dist.TCPStore(launch.address, launch.port, **options)
    except dist.DistError as error:
        place = f"environment: MASTER_ADDR={launch.address} MASTER_PORT={launch.port}"
        remedy = "choose a free port" if is_host else "check the address and the network"
        raise UserError(f"{place}: rank {launch.rank} cannot use it: {one_line(error, 120)}; {remedy}") from None


def _wait_for_host(launch: Launch, patience_s: float) -> None:
    """Wait until something listens at the address. (TCPStore would wait without obeying signals or saying so.)"""
    start = said = time.monotonic()
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=5).close()
            return
        except OSError as error:  # refused, or no such host yet
            reason = one_line(error, 80)
            refused = isinstance(error, ConnectionRefusedError)
        now = time.monotonic()
        if now - start > (patience_s if refused else CONNECT_S):
            who = "torchrun is gone" if patience_s == TORCHRUN_GONE_S else "rank 0 did not come"
            raise UserError(f"{launch.address}:{launch.port}: {who} ({reason}); start the run again") from None
        if now - said > (SAY_AFTER_S if said == start else SAY_EVERY_S):
            said = now
            _say(launch, f"rank {launch.rank} waits for rank 0 at {launch.address}:{launch.port} ({reason})")
        time.sleep(0.1)


def _wait_for(
    store: dist.Store, keys: List[str], patience_s: float, launch: Launch, check: Callable[[], None] = lambda: None
) -> List[bytes]:
    """Wait until the store has all keys, and return their values. (`store.wait` would block signals.)"""
    start = said = time.monotonic()
    while not store.check(keys):
        try:
            check()
        except (OtherRankFailed, Stopped):
            if store.check(keys):  # the other rank left after this round
                break
            raise
        now = time.monotonic()
        if now - start > patience_s:
            raise UserError(
                f"{name_ranks(_missing(store, keys))} did not come to {launch.address}:{launch.port} within "
                f"{patience_s / 60:.0f} minutes; check their machines and the network"
            )
        if now - said > (SAY_AFTER_S if said == start else SAY_EVERY_S):
            said = now
            _say_missing(store, keys, launch)
        time.sleep(POLL_S)
    return store.multi_get(keys)


def _missing(store: dist.Store, keys: Sequence[str]) -> List[int]:
    return [rank for rank, key in enumerate(keys) if not store.check([key])]


def _say_missing(store: dist.Store, keys: Sequence[str], launch: Launch) -> None:
    """Say which ranks are missing. The lowest of those that wait speaks for all."""
    missing = _missing(store, keys)
    if missing and missing[: launch.rank] == list(range(launch.rank)):
        _say(launch, f"rank {launch.rank} waits for {name_ranks(missing)} at {launch.address}:{launch.port}")


def _say(launch: Launch, text: str) -> None:
    remedy = "see their output" if launch.by_torchrun else f"start all {launch.size}, or `{unset_all()}` to run alone"
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        write_line(f"{text}; {remedy}", sys.stderr)

"""A real SLURM for the tests: one controller and two nodes on this machine, all of it in a temporary folder.

It needs no root and no configuration, only Debian's packages slurm-wlm and munge. Without them the tests are skipped; with
TNT_TEST_SLURM=required in the environment they fail instead. They take minutes and run only when that variable is set.
"""

import contextlib
import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NoReturn, Sequence

import pytest

REPO = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"  # where the daemons are, also for an ordinary user
NODES = ("n0", "n1")

# Both nodes are this machine, at different ports. A job starts again when its credential has expired: by default after two
# minutes, here five seconds. Jobs of the urgent partition preempt the others, which have GraceTime to stop by themselves.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=20
JobRequeue=1
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n0,n1 Default=YES PriorityTier=1 GraceTime=15
PartitionName=urgent Nodes=n0,n1 PriorityTier=2
"""


class Cluster:
    """SLURM's commands, on the cluster of the tests."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.repo = REPO
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.env if name.startswith(("SLURM_JOB", "SLURM_STEP", "SBATCH_", "TNT_"))]:
            del self.env[name]  # of a job that the tests themselves run in
        self.env.update(PYTHONPATH=str(REPO), OMP_NUM_THREADS="1")

    def run(self, *command: object, cwd: Path = REPO, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def job(self, number: str) -> Dict[str, str]:
        """What `scontrol show job` says of it."""
        text = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for(self, what: Callable[[], object], output: Path, seconds: float = 240) -> None:
        """Until something holds; with the job's output where it does not."""
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                text = output.read_text() if output.exists() else "(no output)"
                pytest.fail(f"not reached in {seconds} s; the job's output:\n{text}")
            time.sleep(0.1)

    def wait_for_end(self, number: str, output: Path, seconds: float = 240) -> Dict[str, str]:
        """Until a job is over for good, whatever became of it."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_for(lambda: self.job(number)["JobState"] in ends, output, seconds)
        return self.job(number)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if "TNT_TEST_SLURM" not in os.environ:
        pytest.skip("starts a SLURM cluster; set TNT_TEST_SLURM=required to run it")
    if missing:
        _skip(f"SLURM is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge")
    # not pytest's folder: a socket's path must be short
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        with contextlib.ExitStack() as daemons:
            daemons.callback(_end_jobs, cluster)  # the last thing to happen: no process outlives the tests
            problem = _start(cluster, daemons)
            if problem:
                _skip(f"SLURM does not start on this machine: {problem}")
            yield cluster
            cluster.run("scancel", "--state=RUNNING", check=False)
            cluster.run("scancel", "--state=PENDING", check=False)


def _skip(reason: str) -> NoReturn:
    if os.environ.get("TNT_TEST_SLURM") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


def _start(cluster: Cluster, daemons: contextlib.ExitStack) -> str:
    """Start everything. Returns what went wrong, or ""."""
    folder = cluster.folder
    for name in ("state", *NODES):
        (folder / name).mkdir()
    for name in ("gpu0", "gpu1"):
        (folder / name).touch()
    (folder / "munge.key").touch(0o600)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    with contextlib.ExitStack() as held:  # three free ports, held until all are known, so that they differ
        sockets = [held.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    host = socket.gethostname().split(".")[0]
    text = SLURM_CONF.format(folder=folder, host=host, user=getpass.getuser(), ports=ports)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"NodeName=n[0-1] Name=gpu File={folder}/gpu[0-1]\n")  # GPUs to count, not to use

    munge = {name: folder / f"munge.{name}" for name in ("key", "socket", "pid", "log", "seed")}
    options = [f"--{name}-file={munge[name]}" for name in ("key", "pid", "log", "seed")]
    commands = {"munged": ["munged", "--foreground", "--force", f"--socket={munge['socket']}", *options]}
    commands["slurmctld"] = ["slurmctld", "-D"]
    commands.update({node: ["slurmd", "-D", "-N", node] for node in NODES})
    processes = {}
    for name, command in commands.items():
        processes[name] = _daemon(command, folder / f"{name}.err", cluster, daemons)
        deadline = time.monotonic() + 10
        while not munge["socket"].exists() and processes["munged"].poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for name, process in processes.items():
            if process.poll() is not None:
                return f"{name} ended: {_last_line(folder / f'{command[-1]}.err')}"
        states = cluster.run(
            "sinfo", "--noheader", "--Node", "--partition=all", "--format=%T", check=False
        ).stdout.split()
        if states == ["idle"] * len(NODES):
            return ""
        time.sleep(0.2)
    return f"its nodes are {' and '.join(states) or 'unknown'} after 30 s"


def _daemon(command: Sequence[str], log: Path, cluster: Cluster, daemons: contextlib.ExitStack) -> subprocess.Popen:
    def end_with_us() -> None:  # should the tests be killed
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    error = daemons.enter_context(log.open("w"))
    path = shutil.which(command[0], path=PATH)
    process = subprocess.Popen(
        [path, *command[1:]],
        env=cluster.env,
        stdin=subprocess.DEVNULL,
        stdout=error,
        stderr=error,
        preexec_fn=end_with_us,
    )

    def stop() -> None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    daemons.callback(stop)
    return process


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "without a word")


def _end_jobs(cluster: Cluster) -> None:
    """Kill what is left of jobs: they are nobody's children. Their environment names this cluster."""
    for pid in _pids_of(f"SLURM_CONF={cluster.env['SLURM_CONF']}".encode()):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _pids_of(entry: bytes) -> List[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@pytest.fixture(scope="session")
def submit_py() -> List[str]:
    return [sys.executable, str(REPO / "scripts" / "slurm" / "submit.py")]


@pytest.fixture(scope="session")
def template() -> Path:
    return REPO / "scripts" / "slurm" / "train.sbatch"

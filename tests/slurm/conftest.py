"""A real SLURM for the tests: one controller and two nodes on this machine, all of it in a temporary folder.

It needs no root, no configuration and no systemd, only Debian's packages slurm-wlm and munge; without them its tests are
skipped. keeper.py runs the daemons, and ends them whatever becomes of the tests.
"""

import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import pytest

REPO = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"  # where the daemons are, also for an ordinary user

# Both nodes are this machine, at different ports. A job starts again when its credential has expired: by default after two
# minutes, here five seconds. Jobs of the urgent partition preempt the others, which have GraceTime to stop by themselves.
# The number of the first job makes the ports of the rendezvous, where another test's cluster on this machine has others.
# The long timeouts are for busy machines: nothing waits for them where all goes well.
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
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
FirstJobId={first_job}
KillWait=60
MessageTimeout=30
TCPTimeout=10
BatchStartTimeout=60
UnkillableStepTimeout=150
JobRequeue=1
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n0,n1 Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n0,n1 PriorityTier=2
"""


class Cluster:
    """SLURM's commands, on the cluster of the tests."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.repo = REPO
        ours = ("SLURM_", "SBATCH_", "SRUN_", "SCANCEL_", "SINFO_", "TNT_")  # of a job that the tests themselves run in
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.env.update(PATH=PATH, SLURM_CONF=str(folder / "slurm.conf"))
        self.env.update(PYTHONPATH=str(REPO), OMP_NUM_THREADS="1")

    def run(self, *command: object, cwd: Path = REPO, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=180,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def job(self, number: str) -> Dict[str, str]:
        """What `scontrol show job` says of it."""
        text = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for(self, what: Callable[[], object], output: Path, seconds: float = 300) -> None:
        """Until something holds; with the job's output where it does not."""
        deadline = time.monotonic() + seconds
        while not what():
            problem = self.ended_daemons() or (time.monotonic() > deadline and f"not reached in {seconds} s")
            if problem:
                text = output.read_text() if output.exists() else "(no output)"
                pytest.fail(f"{problem}; the job's output:\n{text}")
            time.sleep(0.2)

    def wait_for_end(self, number: str, output: Path) -> Dict[str, str]:
        """Until a job is over for good, whatever became of it."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_for(lambda: self.job(number)["JobState"] in ends, output)
        return self.job(number)

    def wait_until_idle(self, seconds: float = 60) -> str:
        """Until both nodes are. Returns what went wrong, or ""."""
        deadline = time.monotonic() + seconds
        states: List[str] = []
        while states != ["idle", "idle"]:
            if time.monotonic() > deadline:
                return f"its nodes are {' and '.join(states) or 'unknown'} after {seconds} s"
            if self.ended_daemons():
                return self.ended_daemons()
            time.sleep(0.2)
            sinfo = self.run("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T", check=False)
            states = sinfo.stdout.split()
        return ""

    def ended_daemons(self) -> str:
        return (self.folder / "keeper.log").read_text().strip()

    def logs(self) -> List[Tuple[str, str]]:
        """Name and last lines of each log of the daemons."""
        paths = [*sorted(self.folder.glob("*.log")), *sorted(self.folder.glob("*.err"))]
        lines = {path.name: path.read_text(errors="replace").splitlines() for path in paths}
        return [(name, "\n".join(lines[-60:])) for name, lines in lines.items() if lines]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Beside a test that fails, what the daemons logged."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and cluster is not None:
        report.sections += cluster.logs()
    return report


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge")
    for _ in range(5):
        with ExitStack() as stack:
            cluster = _start(stack)
            problem = cluster.wait_until_idle()
            if not problem:
                yield cluster
                return
            logs = "".join(f"\n---- {name}\n{text}" for name, text in cluster.logs())
        if "Address already in use" not in logs:  # else, other ports
            break
    pytest.fail(f"SLURM does not start on this machine: {problem}{logs}")


def _start(stack: ExitStack) -> Cluster:
    """Start the daemons, which the stack ends."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # not pytest's folder: a socket's path must be short
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    for name in ("state", "n0", "n1"):
        (folder / name).mkdir()
    (folder / "munge.key").touch(0o600)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    with ExitStack() as held:  # three free ports, held until all are known, so that they differ
        sockets = [held.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
    text = SLURM_CONF.format(folder=folder, host=host, user=user, ports=ports, first_job=random.randint(1, 40000))
    (folder / "slurm.conf").write_text(text)
    devices = ("/dev/null", "/dev/zero")  # GPUs to count, not to use
    gpus = [f"NodeName=n[0-1] Name=gpu File={device}\n" for device in devices]
    (folder / "gres.conf").write_text("".join(gpus))

    cluster = Cluster(folder)
    with (folder / "keeper.log").open("w") as log:
        keeper = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("keeper.py"), folder, str(os.getpid())],
            env=cluster.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C, or a kill of our process group, is not for it
        )

    def stop() -> None:
        keeper.terminate()
        keeper.wait(60)

    stack.callback(stop)
    return cluster


@pytest.fixture(scope="session")
def submit_py() -> List[str]:
    return [sys.executable, str(REPO / "scripts" / "slurm" / "submit.py")]


@pytest.fixture(scope="session")
def template() -> Path:
    return REPO / "scripts" / "slurm" / "train.sbatch"

"""A real Slurm on this machine, for as long as a test runs: munged, slurmctld and two slurmd.

No systemd, no cgroups, nothing outside one folder; needs root for namespaces. Each node has a
hostname of its own and, where the kernel allows it, its own network, so that a job that takes
``localhost`` for the first node fails here as it would on a cluster.

    with Cluster() as cluster:
        job = cluster.sbatch("job.sbatch")
        cluster.wait_for(job, "COMPLETED")
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_skyladder.testing import free_port

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "shellcheck", "unshare", "nsenter")
NODES = ("node0", "node1")
CPUS = 128  # declared, as on a node of the examples
GPUS = 2  # links to /dev/null
KILL_WAIT_SECONDS = 10
START_SECONDS = 30
CLIENT_SECONDS = 20  # a client call hangs about as long when slurmctld is gone


def why_not() -> str | None:
    """Return why a cluster cannot be started here, or None."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (make test-slurm installs them)"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "needs namespaces, which the kernel refuses"
    return None


class Cluster:
    """Two nodes in the partitions ``batch`` and, evicting its jobs, ``urgent``."""

    def __init__(self) -> None:
        # unix sockets have at most 108 characters
        self.root = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp"))
        self.root.chmod(0o755)  # munge wants its socket to be reachable
        self._daemons: dict[str, int] = {}  # name -> process id, in the order of their start
        self._network = _Network(self.root)

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what tests use ---

    def run(self, *words: str, check: bool = True) -> str:
        """Run a client command and return what it prints."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=CLIENT_SECONDS
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout.strip()

    @property
    def environment(self) -> dict[str, str]:
        """For commands that talk to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.root / "etc/slurm.conf")}

    def sbatch(self, *words: str) -> str:
        """Submit and return the job's id."""
        return self.run("sbatch", "--parsable", *words).split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """Return what scontrol knows of a job."""
        pairs = (word.partition("=") for word in self.run("scontrol", "show", "job", job).split())
        return {name: value for name, found, value in pairs if found}

    def state(self, job: str) -> str:
        """Return RUNNING, PENDING, COMPLETED, ..."""
        return self.show(job)["JobState"]

    def wait_for(self, job: str, *states: str, seconds: float = 600) -> None:
        """Wait until a job is in one of some states; fail at once where it can no longer be."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL"}

        def there() -> bool:
            state = self.state(job)
            assert state in states or state not in final, f"job {job} is {state}, not {states}"
            return state in states

        wait_until(there, f"job {job} to be {' or '.join(states)}", seconds)

    def warn(self, job: str) -> None:
        """Send a job the signal that Slurm sends ahead of the time limit.

        What becomes of scancel is ignored: on a busy machine it sends the signal again and again,
        until the job has ended, and complains.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.run("scancel", "--batch", "--signal=USR1", job, check=False)

    def fail(self, node: str) -> None:
        """Let a node fail: everything on it is gone, and Slurm has noticed."""
        slurmd = self._daemons.pop(node)
        host = os.readlink(f"/proc/{slurmd}/ns/uts")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
                if os.readlink(process / "ns" / "uts") == host:
                    os.kill(int(process.name), signal.SIGKILL)
        (self.root / "run" / f"{node}.pid").unlink()
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def repair(self, node: str) -> None:
        """Bring a node back; it is used once its slurmd has reported (ReturnToService)."""
        self._start_node(node)

    # --- start and stop ---

    def _start(self) -> None:
        for name in ("etc", "run", "log", "state"):
            (self.root / name).mkdir()
        munge = self.root / "munge"
        munge.mkdir(mode=0o700)
        (munge / "key").write_bytes(secrets.token_bytes(1024))
        (munge / "key").chmod(0o600)
        self._network.start()
        self._write_configuration()
        self._daemon(
            *("munged", f"--key-file={munge / 'key'}", f"--socket={self.root / 'run/munge'}"),
            *(f"--pid-file={self.root / 'run/munged.pid'}", f"--log-file={munge / 'log'}"),
            f"--seed-file={munge / 'seed'}",
            name="munged",
        )
        configuration = str(self.root / "etc/slurm.conf")
        self._daemon(
            *self._as_host("ctl"), "slurmctld", "-c", "-f", configuration, name="slurmctld"
        )
        for node in NODES:
            self._start_node(node)
        wait_until(
            lambda: (
                self.run("sinfo", "-h", "-p", "batch", "-t", "idle", "-o", "%D", check=False)
                == str(len(NODES))
            ),
            f"idle nodes, see {self.root / 'log'}",
            START_SECONDS,
        )

    def _start_node(self, node: str) -> None:
        configuration = str(self.root / "etc/slurm.conf")
        self._daemon(*(*self._as_host(node), "slurmd", "-N", node, "-f", configuration), name=node)

    def _daemon(self, *words: str, name: str) -> None:
        """Start something that puts itself into the background."""
        output = self.root / "log" / f"{name}.out"
        with output.open("w") as file:  # not a pipe: the daemon would keep it open
            code = subprocess.run(words, stdout=file, stderr=file, timeout=START_SECONDS).returncode
        assert code == 0, f"{' '.join(words)}: {output.read_text()}"
        path = self.root / "run" / f"{name}.pid"
        wait_until(lambda: path.exists() and path.read_text().strip() != "", path.name, 10)
        self._daemons[name] = int(path.read_text())

    def _as_host(self, name: str) -> list[str]:
        """Return what runs a command with its own hostname and /etc/hosts."""
        script = (
            'hostname "$1"; for f in hosts nsswitch.conf; do mount --bind "$2/etc/$f" "/etc/$f"; '
            'done; shift 2; exec "$@"'
        )
        unshare = ["unshare", "--uts", "--mount", "--propagation", "slave"]
        return [
            *(*self._network.enter(name), *unshare, "bash", "-ec", script, "_"),
            *(name, str(self.root)),
        ]

    def _write_configuration(self) -> None:
        etc = self.root / "etc"
        (etc / "slurm.conf").write_text(_configuration(self.root, self._network))
        lines = []
        for node in NODES:
            (self.root / f"spool.{node}").mkdir()
            devices = self.root / "dev" / node
            devices.mkdir(parents=True)
            for gpu in range(GPUS):  # Slurm wants a character device
                (devices / f"nvidia{gpu}").symlink_to("/dev/null")
            lines.append(f"NodeName={node} Name=gpu File={devices}/nvidia[0-{GPUS - 1}]\n")
        (etc / "gres.conf").write_text("".join(lines))
        hosts = "".join(f"{self._network.address(n)} {n}\n" for n in ("ctl", *NODES))
        (etc / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        switch = Path("/etc/nsswitch.conf").read_text()
        # no DNS out of a network of its own: do not wait for an answer
        (etc / "nsswitch.conf").write_text(re.sub(r"(?m)^hosts:.*", "hosts: files", switch))

    def close(self) -> None:
        """End all jobs, all daemons, and remove the folder."""
        if len(self._daemons) > 1:
            self.run("scancel", "--full", "--user=root", check=False)
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                wait_until(lambda: not self.run("squeue", "-h", check=False), "jobs to end", 30)
        for pid in reversed(
            self._daemons.values()
        ):  # munged last: the others sign messages to the end
            _end(pid, self.root)
        self._daemons.clear()
        self._network.stop()
        shutil.rmtree(self.root, ignore_errors=True)


class _Network:
    """A network for each node, joined by a bridge; or this machine's own where that is refused."""

    def __init__(self, root: Path) -> None:
        number = os.getpid() % 250
        self._prefix = f"sl{os.getpid() % 100_000}"
        self._subnet = f"10.77.{number}"
        self.separate = False
        self.port = free_port(num_behind=220)

    def address(self, name: str) -> str:
        """Return the address of a node or of ``ctl``."""
        if not self.separate:
            return "127.0.0.1"
        return f"{self._subnet}.{1 if name == 'ctl' else 10 + NODES.index(name)}"

    def enter(self, name: str) -> list[str]:
        """Return what runs a command in a node's network."""
        if not self.separate or name == "ctl":
            return []
        return ["nsenter", f"--net=/run/netns/{self._prefix}{name}"]

    def start(self) -> None:
        """Make the networks."""
        bridge = f"{self._prefix}b"
        if shutil.which("ip") is None or _ip(f"link add {bridge} type bridge", check=False):
            return
        self.separate = True
        _ip(f"addr add {self.address('ctl')}/24 dev {bridge}")
        _ip(f"link set {bridge} up")
        for index, node in enumerate(NODES):
            space, cable = f"{self._prefix}{node}", f"{self._prefix}v{index}"
            _ip(f"netns add {space}")
            _ip(f"link add {cable} type veth peer name eth0 netns {space}")
            _ip(f"link set {cable} master {bridge} up")
            _ip(f"-n {space} addr add {self.address(node)}/24 dev eth0")
            _ip(f"-n {space} link set eth0 up")
            _ip(f"-n {space} link set lo up")

    def stop(self) -> None:
        """Remove them."""
        if not self.separate:
            return
        for index, node in enumerate(NODES):
            _ip(f"link del {self._prefix}v{index}", check=False)
            _ip(f"netns del {self._prefix}{node}", check=False)
        _ip(f"link del {self._prefix}b", check=False)


def _configuration(root: Path, network: _Network) -> str:
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={node} NodeAddr={network.address(node)} "
        f"Port={network.port + 1 + index} CPUs={CPUS} Boards=1 SocketsPerBoard=1 "
        f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=512000 Gres=gpu:{GPUS} State=UNKNOWN"
        for index, node in enumerate(NODES)
    )
    return f"""\
ClusterName=test
SlurmctldHost=ctl({network.address("ctl")})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job is held for cred_expire + 1 seconds; the default is 120
AuthInfo=socket={root}/run/munge,cred_expire=5
# listen on the own address, not on all
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={network.port}
SrunPortRange={network.port + 20}-{network.port + 220}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# believe the declared CPUs and memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait={KILL_WAIT_SECONDS}
MinJobAge=3600
SlurmctldTimeout=10
SlurmdTimeout=60
MessageTimeout=20
BatchStartTimeout=20
UnkillableStepTimeout=30
InactiveLimit=0
# off: a job says itself how long it waits for its last task
WaitTime=0
DefMemPerCPU=100
GresTypes=gpu
{nodes}
PartitionName=DEFAULT Nodes=ALL DefaultTime=10 MaxTime=INFINITE State=UP
PartitionName=batch Default=YES PriorityTier=10
PartitionName=urgent PriorityTier=100 PreemptMode=OFF
"""


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait for something; fail with its name."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)


def _ip(words: str, check: bool = True) -> int:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {words}: {done.stderr}"
    return done.returncode


def _end(pid: int, root: Path) -> None:
    """End one of our daemons: TERM, then KILL; not a process that got its number since."""

    def ours() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except FileNotFoundError:
            return False
        return state != "Z" and f"{root}/" in line

    if ours():
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            wait_until(lambda: not ours(), "a daemon to end", 10)
    if ours():
        os.kill(pid, signal.SIGKILL)

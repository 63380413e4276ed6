"""A real Slurm cluster of two nodes on this machine, for tests: munged, slurmctld and two slurmd in a folder.

Needs Debian's ``slurmctld slurmd slurm-client munge`` and root (slurmd starts jobs as their owners). Nothing outside
the folder is read or written but the daemons' sockets and ports, which the kernel picks. Both nodes are this host: a
job's ranks reach each other over loopback, and ``kill_node`` kills one node's processes and leaves the other's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("node1", "node2")
_CONFIG = """\
ClusterName=oisd
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
ReturnToService=0
KillWait=20
MinJobAge=3600
SlurmdTimeout=300
GresTypes=gpu
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000 Gres=gpu:4
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000 Gres=gpu:4
PartitionName=all Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def _program(name: str) -> str | None:
    """The path of a program: daemons live in sbin, which not every user's PATH has."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


class SlurmCluster:
    """Two nodes of 8 CPUs and 4 pretended GPUs each, up while entered.

    Args:
        folder: for all of its files; its path must be short, since sockets are in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "OISD_"))
        } | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        ports = _free_ports(3)
        names = {"folder": self.folder, "ports": ports, "nodes": NODES, "host": socket.gethostname().split(".")[0]}
        (self.folder / "slurm.conf").write_text(_CONFIG.format(**names))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for index in range(4):
            device = self.folder / f"gpu{index}"  # another null device: what has no driver can still be counted out
            os.mknod(device, 0o600 | 0o020000, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            "".join(f"NodeName={node} Name=gpu File={self.folder}/gpu[0-3]\n" for node in NODES)
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        flags = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        try:
            self._start(
                "munged", "--foreground", "--force", "--key-file", key, "--socket", flags["socket"],
                "--pid-file", flags["pid"], "--log-file", flags["log"], "--seed-file", flags["seed"],
            )  # fmt: skip
            wait_for(flags["socket"].exists, "munged's socket", 20)
            self._start("slurmctld", "-D", "-f", self.folder / "slurm.conf")
            for node in NODES:
                self.start_node(node)
            wait_for(lambda: set(self.node_states().values()) == {"idle"}, "idle nodes", 60)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    # ------------------------------------------------------------------------------------------------ nodes

    def start_node(self, node: str) -> None:
        """Start a node's slurmd; after :meth:`kill_node` also tell the controller that it is back."""
        again = node in self._daemons
        self._start("slurmd", "-D", "-N", node, "-f", self.folder / "slurm.conf", name=node)
        if again:
            self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def kill_node(self, node: str) -> None:
        """SIGKILL all of a node's processes, as a power cut would, and mark the node down."""
        victims = [psutil.Process(self._daemons[node].pid), *self._processes_of(node)]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # all at once: none may live to report another's death
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.send_signal(number)
        self._daemons[node].wait()
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=killed")

    def _processes_of(self, node: str) -> list[psutil.Process]:
        """The processes of a node's jobs, and the slurmstepds that started them, which leave slurmd's process tree."""
        mark = {"SLURMD_NODENAME": node, "SLURM_CONF": self.environment["SLURM_CONF"]}  # no other cluster's
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if mark.items() <= process.environ().items():
                    found[process.pid] = process
                    parent = process.parent()
                    if parent is not None and parent.name() == "slurmstepd":
                        found[parent.pid] = parent
        return list(found.values())

    def node_states(self) -> dict[str, str]:
        """``{"node1": "idle", ...}``"""
        text = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False)
        return dict(line.split() for line in text.splitlines() if line.strip())

    # ------------------------------------------------------------------------------------------------ jobs

    def run(self, *command: object, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        """Run a Slurm command on the login node; returns what it printed."""
        result = subprocess.run(
            [str(part) for part in command], env=self.environment | dict(environment or {}), text=True,
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        if check and result.returncode:
            raise AssertionError(f"{command} failed with {result.returncode}: {result.stdout}{result.stderr}")
        return result.stdout

    def submit(self, *arguments: object, environment: Mapping[str, str] | None = None) -> int:
        """``sbatch`` with arguments; returns the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, environment=environment).split(";")[0])

    def job(self, job: int | str) -> dict[str, str]:
        """What ``scontrol show job`` says of one job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job: int | str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED``, ..."""
        return self.job(job)["JobState"]

    def wait_for_end(self, jobs: Sequence[int | str], limit_s: float) -> list[str]:
        """Wait until jobs have ended; their states. A requeued job has not."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
        wait_for(lambda: all(self.state(job) in over for job in jobs), f"the end of jobs {jobs}", limit_s, self.logs)
        return [self.state(job) for job in jobs]

    def logs(self) -> str:
        """Queue, nodes and the controller's last words: for the message of a failed test."""
        log = self.folder / "slurmctld.log"
        tail = log.read_text().splitlines()[-15:] if log.exists() else []
        return "\n".join([self.run("squeue", "-t", "all", check=False), str(self.node_states()), *tail])

    # ------------------------------------------------------------------------------------------------ daemons

    def _start(self, program: str, *arguments: object, name: str = "") -> None:
        path = _program(program)
        assert path is not None, f"{program} is not installed"
        output = (self.folder / f"{name or program}.out").open("ab")
        self._daemons[name or program] = subprocess.Popen(
            [path, *map(str, arguments)], env=self.environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def _stop(self) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            self.run("scancel", "--user=root", check=False)
            running = "--states=running,completing"
            wait_for(
                lambda: not self.run("squeue", "--noheader", running, check=False).strip(), "cancelled jobs", 20,
                or_go_on=True,
            )  # fmt: skip
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def wait_for(
    true: Callable[[], object], what: str, limit_s: float, why: Callable[[], str] = str, *, or_go_on: bool = False
) -> None:
    """Poll until ``true()``; after ``limit_s`` seconds fail and say what was waited for, and ``why()``."""
    deadline = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > deadline:
            assert or_go_on, f"no {what} after {limit_s} s\n{why()}"
            return
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def main() -> None:
    """Keep a cluster up for a person."""
    reason = missing()
    if reason or len(sys.argv) != 2:
        sys.exit(reason or "usage: python -m tests.helpers.slurm_cluster FOLDER")
    for number in (signal.SIGINT, signal.SIGTERM):  # shells let what they put in the background ignore the first
        signal.signal(number, signal.default_int_handler)
    with SlurmCluster(Path(sys.argv[1]).absolute()) as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']} OISD_HOST_FORMAT=127.0.0.1 GLOO_SOCKET_IFNAME=lo")
        print("in another shell; Ctrl-C here ends the cluster", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

"""A real SLURM of two nodes, n1 and n2, on this machine: own ports, own keys, on loopback, started and stopped by pid.

Each node says it has 48 cores and four GPUs (devices that every Linux has), as `run.sh` asks for. A task gets no more
than a place to run: nothing is bound or limited.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

COMMANDS = ("sbatch", "srun", "scancel", "scontrol", "sinfo", "slurmctld", "slurmd", "munged")
KILL_WAIT_S = 30
NODES = ("n1", "n2")

_CONFIG = """\
ClusterName=llavaforge
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
MpiDefault=none
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdTimeout=10
MessageTimeout=10
KillWait={kill_wait_s}
ReturnToService=2
JobRequeue=1
KillOnBadExit=1
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=48 RealMemory=1000 Gres=gpu:4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=48 RealMemory=1000 Gres=gpu:4
PartitionName=main Nodes=n[1-2] Default=YES PriorityTier=10
PartitionName=grace Nodes=n[1-2] PriorityTier=1 GraceTime=60
PartitionName=low Nodes=n[1-2] PriorityTier=1
"""


class Cluster:
    """The cluster while it runs.

    Attributes:
        environment: what the SLURM commands need to talk to it, and the jobs besides (run.sh passes it on).
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self.environment = {**environment, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start munge, the controller and both nodes, and wait until they are idle."""
        self._configure()
        munge = self._folder / "munge"
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{key}={munge / name}" for key, name in options.items()))
        wait(lambda: (munge / "socket").exists(), 120, lambda: self._said("munged"))
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait(lambda: self.node_states() == ["idle", "idle"], 300, lambda: self._said("slurmctld") + self._said("n1"))

    def stop(self) -> None:
        """End all jobs and daemons, and whatever of them is left."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root")
            self.run("scancel", "--user=root", "--signal=KILL")
        kill(self._processes("n1") + self._processes("n2"))
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()

    def run(self, *command: str, **environment: str) -> str:
        """Run a SLURM command and return what it prints."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, folder: Path, *arguments: str, **environment: str) -> str:
        """Submit a job that runs and leaves its log in `folder`; return its number."""
        return self.run("sbatch", "--parsable", f"--chdir={folder}", *arguments, **environment).strip()

    def field(self, job: str, name: str) -> str:
        """Return a field of `scontrol show job`."""
        found = re.search(rf"(?:^|\s){name}=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job))
        assert found is not None, name
        return found[1]

    def wait_for(self, job: str, *states: str, timeout_s: float = 900) -> str:
        """Wait until a job is in one of the states; return that."""

        wait(lambda: self.field(job, "JobState") in states, timeout_s, lambda: self._story(job))
        return self.field(job, "JobState")

    def wait_requeued(self, job: str, timeout_s: float = 900) -> None:
        """Wait until a job is back in the queue, and assert that SLURM holds it there for a while."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def settled() -> bool:
            return self.field(job, "Reason") == "BeginTime" or self.field(job, "JobState") in ended

        wait(settled, timeout_s, lambda: self._story(job))
        assert (self.field(job, "JobState"), self.field(job, "Restarts")) == ("PENDING", "1"), self._story(job)

    def release(self, job: str) -> None:
        """Spare a requeued job SLURM's two minutes.

        But not all of them: slurmd knows a start that it ended by the second, and refuses another one in that second
        ("Job credential revoked").
        """
        time.sleep(2)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def log(self, job: str) -> str:
        """Return what a job has said so far."""
        path = Path(self.field(job, "StdOut"))
        return path.read_text() if path.exists() else ""

    def node_states(self) -> list[str]:
        """Return the states of n1 and n2, such as `idle` or `down*`."""
        return self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """Let a node die: its daemon, the keepers of its job steps and their tasks, all with SIGKILL."""
        kill(self._processes(node))
        self._daemons[node].wait()

    def _processes(self, node: str) -> list[psutil.Process]:
        """Return the daemon of a node, its slurmstepds (which keep its log open) and all below them."""
        log = str(self._folder / f"{node}.log")
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("slurm") and any(file.path == log for file in process.open_files()):
                    found += [process, *process.children(recursive=True)]
        return found

    def _configure(self) -> None:
        (self._folder / "munge").mkdir()
        (self._folder / "state").mkdir()
        key = self._folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        values = {"host": host, "folder": self._folder, "kill_wait_s": KILL_WAIT_S}
        # llavaforge derives the ranks' port from the job's number: two clusters on one machine must not share it.
        first_job = 1000 + secrets.randbelow(1000) * 10
        text = _CONFIG.format(ports=_free_ports(3), first_job=first_job, **values)
        (self._folder / "slurm.conf").write_text(text)
        devices = [f"NodeName=n[1-2] Name=gpu File=/dev/{name}\n" for name in ("null", "zero", "full", "random")]
        (self._folder / "gres.conf").write_text("".join(devices))
        for empty in ("plugstack.conf", "cgroup.conf"):
            (self._folder / empty).touch()
        for node in NODES:
            (self._folder / node).mkdir()

    def _daemon(self, command: str, *arguments: str, name: str = "") -> None:
        program = shutil.which(command, path=SEARCH_PATH)
        assert program is not None
        with (self._folder / f"{name or command}.out").open("ab") as output:
            daemon = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # ctrl-C is for the tests; the fixture then stops the daemons in their order
            )
        self._daemons[name or command] = daemon

    def _story(self, job: str) -> str:
        return f"{self.run('scontrol', 'show', 'job', job)}\n{self.log(job)}\n{self._said('slurmctld')}"

    def _said(self, daemon: str) -> str:
        return "\n".join((self._folder / f"{daemon}.out").read_text().splitlines()[-15:])


SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # Debian's place for daemons


def why_not() -> str | None:
    """Return why there can be no cluster here, or None."""
    missing = [command for command in COMMANDS if shutil.which(command, path=SEARCH_PATH) is None]
    if missing:
        return f"no {', '.join(missing)}: install slurmctld, slurmd, slurm-client and munge"
    return None if os.geteuid() == 0 else "slurmd and slurmctld run as root"


def wait(condition: Callable[[], bool], timeout_s: float, told: Callable[[], str]) -> None:
    """Wait until a condition holds; fail with `told()` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(subprocess.SubprocessError):  # a controller that is not up yet
            if condition():
                return
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {told()}"
        time.sleep(0.2)


def kill(processes: list[psutil.Process]) -> None:
    """Kill processes at once, first all and then wait."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _free_ports(number: int) -> list[int]:
    def held() -> Iterator[socket.socket]:
        for _ in range(number):
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            yield listener

    listeners = list(held())
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports

"""Simulated machines: namespaces for network, processes, mounts and host names, connected by a switch.

Each machine has its own address, processes, ``/tmp``, home folder and shared memory. It runs as long as a pipe to this
process is open. When this process ends, even by SIGKILL, the kernel ends all processes of the machines and removes
their links, mounts and files. Each network is isolated from all others, so several can exist at once.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]
SUBNET = "10.77.0"
CLONE_NEWNET = 0x40000000

SWITCH = "ip link set lo up && ip link add switch type bridge && ip link set switch up && echo up && read -r _"

MACHINE = r"""
set -e
name=$1 hosts=$2 && shift 2
echo "$name" > /proc/sys/kernel/hostname
# A new /tmp, which has only the given folders of the real one, at the same paths.
mount -t tmpfs tmpfs /mnt && chmod 1777 /mnt
for folder in "$@"; do
    case $folder in /tmp/*) mkdir -p "/mnt/${folder#/tmp/}" && mount --bind "$folder" "/mnt/${folder#/tmp/}" ;; esac
done
mount --move /mnt /tmp
mkdir /tmp/home
mount -t tmpfs tmpfs /dev/shm
printf '127.0.0.1 localhost\n%b' "$hosts" > /tmp/hosts && mount --bind /tmp/hosts /etc/hosts
ip link set lo up
echo up
read -r _  # wait until the pipe is closed; meanwhile this shell reaps zombies
"""


def missing_support() -> str | None:
    """Return what this machine lacks to simulate a network, or None if nothing is missing."""
    missing = [program for program in ("ip", "unshare", "nsenter", "mount") if shutil.which(program) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian's iproute2 and util-linux)"
    attempt = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "switch", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"needs the right to make namespaces and bridges: {attempt.stderr.strip()}" if attempt.returncode else None


class _Namespaces:
    """Namespaces that exist until ``close``, kept by a shell that waits for the end of its input."""

    def __init__(self, kinds: Sequence[str], script: str, *arguments: str) -> None:
        self.holder = subprocess.Popen(
            ["unshare", *kinds, "bash", "-c", script, "bash", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # unshare prints a harmless error when it ends
            text=True,
        )
        assert self.holder.stdout is not None and self.holder.stderr is not None
        if self.holder.stdout.readline() != "up\n":
            raise RuntimeError(f"the namespaces could not be created: {self.holder.stderr.read()}")
        # In a new process namespace, the shell is the only child of ``unshare``.
        inner = psutil.Process(self.holder.pid).children()
        self.pid = inner[0].pid if inner else self.holder.pid

    def close(self) -> None:
        """End all processes in the namespaces, if they still run."""
        with contextlib.suppress(OSError):
            self.holder.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        self.holder.wait()


class Machine:
    """A simulated machine; off until ``boot``.

    Attributes:
        address: IP address in the network.
        visible: folders in ``/tmp`` that the machine shares with this one. It also shares all folders outside ``/tmp``.
        environment: environment of all its processes.
    """

    def __init__(self, network: "Network", name: str, number: int, visible: Sequence[Path]) -> None:
        self.network, self.name, self.address, self.visible = network, name, f"{SUBNET}.{number}", visible
        self.environment = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": "/tmp/home",
            "LANG": "C.UTF-8",
        }
        self._namespaces: _Namespaces | None = None

    def boot(self) -> None:
        """Start the machine, with empty temporary folders."""
        assert self._namespaces is None, f"{self.name} is on already"
        kinds = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        folders = map(str, self.visible)
        self._namespaces = _Namespaces(kinds, MACHINE, self.name, self.network.hosts(), *folders)
        self.network.plug_in(self)

    def lose(self) -> None:
        """Kill all processes at once, and remove the machine from the network, as in a power failure."""
        if self._namespaces is not None:
            self._namespaces.close()
            self._namespaces = None

    @property
    def pid(self) -> int:
        """Process id of the machine's first process, as seen from this process's namespace."""
        assert self._namespaces is not None, f"{self.name} is off"
        return self._namespaces.pid

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the machine, as seen from this process's namespace."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                    processes.append(process)
        return processes

    def runs(self, title: str) -> bool:
        """Return whether the machine runs a process whose command line starts with ``title``."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    return True
        return False

    def kill(self, matches: Callable[[str, list[str]], bool]) -> int:
        """Send SIGKILL to the processes whose name and command line ``matches`` accepts, and return their number."""
        count = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if matches(process.name(), process.cmdline()):
                    process.kill()
                    count += 1
        return count

    def start(self, *words: str, folder: str | Path = "/tmp", **options: object) -> "subprocess.Popen[str]":
        """Start a program on the machine. ``options`` are passed to ``Popen``."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--ipc", "--pid"]
        command = [*enter, "env", "--chdir", str(folder), *words]
        return subprocess.Popen(command, env=self.environment, text=True, **options)  # type: ignore[call-overload,no-any-return]

    def run(self, *words: str, folder: str | Path = "/tmp", seconds: float = 120.0) -> str:
        """Run a program, which must succeed, on the machine, and return its output."""
        process = self.start(*words, folder=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=seconds)
        assert process.returncode == 0, f"{self.name}: {' '.join(words)}: exit code {process.returncode}\n{output}"
        return str(output)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Put sockets that this thread opens in the block into the machine's network."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(descriptor: int) -> None:
            if libc.setns(descriptor, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

        with open("/proc/thread-self/ns/net") as home, open(f"/proc/{self.pid}/ns/net") as there:
            enter(there.fileno())
            try:
                yield
            finally:
                enter(home.fileno())


class Network:
    """A switch and its machines."""

    def __init__(self) -> None:
        self.machines: list[Machine] = []
        self._switch = _Namespaces(["--net"], SWITCH)

    def add(self, name: str, visible: Sequence[Path] = ()) -> Machine:
        """Add a machine, which is off. Add all machines before booting any, so that each knows the names of all."""
        self.machines.append(Machine(self, name, len(self.machines) + 1, visible))
        return self.machines[-1]

    def hosts(self) -> str:
        """Return the lines of /etc/hosts for all machines."""
        return "".join(f"{machine.address} {machine.name}\\n" for machine in self.machines)

    def plug_in(self, machine: Machine) -> None:
        """Connect a booted machine to the switch."""
        link = ["type", "veth", "peer", "name", "eth0", "netns", str(machine.pid)]
        # Remove the link of an earlier boot, unless the kernel has done so.
        self._ip("link", "delete", "dev", machine.name, is_checked=False)
        self._ip("link", "add", "name", machine.name, *link)
        self._ip("link", "set", "dev", machine.name, "master", "switch", "up")
        machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")

    def cut(self, machine: Machine) -> None:
        """Disconnect a machine from the network."""
        self._ip("link", "set", "dev", machine.name, "down")

    def mend(self, machine: Machine) -> None:
        """Reconnect a machine."""
        self._ip("link", "set", "dev", machine.name, "up")

    def close(self) -> None:
        """Stop all machines and the switch, if they still run."""
        for machine in self.machines:
            machine.lose()
        self._switch.close()

    def _ip(self, *words: str, is_checked: bool = True) -> None:
        command = ["nsenter", "--target", str(self._switch.pid), "--net", "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if is_checked and done.returncode:
            raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")

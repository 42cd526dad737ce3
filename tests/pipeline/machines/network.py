"""Machines on this machine: namespaces for network, processes, mounts and host names, joined by a switch.

Each machine has an address of its own and sees neither the processes of the others nor their ``/tmp``, home and shared
memory. It lives as long as a pipe to this process is open: whatever ends this process, Ctrl-C, an error or SIGKILL,
the kernel ends every process of the machines, and with them their links, mounts and files. Nothing of it is seen
outside, so that any number of such networks can be up at once, and there is no way from them to any other network.
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
# A /tmp of its own, in which of the real one only the given folders are seen, where they are.
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
read -r _  # until the pipe is closed; meanwhile this shell reaps what its processes leave behind
"""


def why_not() -> str | None:
    """What this machine lacks for such a network; None if nothing."""
    missing = [program for program in ("ip", "unshare", "nsenter", "mount") if shutil.which(program) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian's iproute2 and util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "switch", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"needs the right to make namespaces and bridges: {tried.stderr.strip()}" if tried.returncode else None


class _Namespaces:
    """Namespaces that are there until ``close``: a shell that waits for its input to end."""

    def __init__(self, kinds: Sequence[str], script: str, *arguments: str) -> None:
        self.holder = subprocess.Popen(
            ["unshare", *kinds, "bash", "-c", script, "bash", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # at its end this version of unshare complains about itself
            text=True,
        )
        assert self.holder.stdout is not None and self.holder.stderr is not None
        if self.holder.stdout.readline() != "up\n":
            raise RuntimeError(f"the namespaces could not be made: {self.holder.stderr.read()}")
        # With a namespace of processes, the shell is the only child of ``unshare``.
        inner = psutil.Process(self.holder.pid).children()
        self.pid = inner[0].pid if inner else self.holder.pid

    def close(self) -> None:
        """End all that runs there; harmless if it is over."""
        with contextlib.suppress(OSError):
            self.holder.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        self.holder.wait()


class Machine:
    """A machine of a network: off until ``boot``.

    Attributes:
        address: its address in the network.
        visible: folders below ``/tmp`` that it sees, beside all that lies elsewhere.
        environment: of every process that is started on it.
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
        """Switch it on, with nothing left of what it was before."""
        assert self._namespaces is None, f"{self.name} is on already"
        kinds = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        folders = map(str, self.visible)
        self._namespaces = _Namespaces(kinds, MACHINE, self.name, self.network.hosts(), *folders)
        self.network.plug_in(self)

    def lose(self) -> None:
        """SIGKILL to every process at once and no word on the network, as when the power goes."""
        if self._namespaces is not None:
            self._namespaces.close()
            self._namespaces = None

    @property
    def pid(self) -> int:
        """Of its first process, as seen from here."""
        assert self._namespaces is not None, f"{self.name} is off"
        return self._namespaces.pid

    def processes(self) -> list[psutil.Process]:
        """All that run on it, as seen from here."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                    found.append(process)
        return found

    def runs(self, title: str) -> bool:
        """Whether a process whose title begins like this runs on it."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    return True
        return False

    def kill(self, is_meant: Callable[[str, list[str]], bool]) -> int:
        """SIGKILL to the processes that ``is_meant``, by name and command line; returns how many there were."""
        count = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if is_meant(process.name(), process.cmdline()):
                    process.kill()
                    count += 1
        return count

    def start(self, *words: str, folder: str | Path = "/tmp", **options: object) -> "subprocess.Popen[str]":
        """Start a program on it; ``options`` as of ``Popen``."""
        entering = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--ipc", "--pid"]
        command = [*entering, "env", "--chdir", str(folder), *words]
        return subprocess.Popen(command, env=self.environment, text=True, **options)  # type: ignore[call-overload,no-any-return]

    def run(self, *words: str, folder: str | Path = "/tmp", seconds: float = 120.0) -> str:
        """Run a program on it to its end, which must be a good one; returns what it printed."""
        process = self.start(*words, folder=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=seconds)
        assert process.returncode == 0, f"{self.name}: {' '.join(words)}: exit code {process.returncode}\n{output}"
        return str(output)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Within the block, sockets that this thread opens are in the machine's network; no other thread's are."""
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
    """A switch and the machines on it."""

    def __init__(self) -> None:
        self.machines: list[Machine] = []
        self._switch = _Namespaces(["--net"], SWITCH)

    def add(self, name: str, visible: Sequence[Path] = ()) -> Machine:
        """A machine that is off; add all before the first one boots, for it to know their names."""
        self.machines.append(Machine(self, name, len(self.machines) + 1, visible))
        return self.machines[-1]

    def hosts(self) -> str:
        """The lines of /etc/hosts."""
        return "".join(f"{machine.address} {machine.name}\\n" for machine in self.machines)

    def plug_in(self, machine: Machine) -> None:
        """Join a machine that has just booted to the switch."""
        link = ["type", "veth", "peer", "name", "eth0", "netns", str(machine.pid)]
        self._ip(
            "link", "delete", "dev", machine.name, is_checked=False
        )  # of an earlier boot, until the kernel removes it
        self._ip("link", "add", "name", machine.name, *link)
        self._ip("link", "set", "dev", machine.name, "master", "switch", "up")
        machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")

    def cut(self, machine: Machine) -> None:
        """Pull a machine's cable."""
        self._ip("link", "set", "dev", machine.name, "down")

    def mend(self, machine: Machine) -> None:
        """Put it back."""
        self._ip("link", "set", "dev", machine.name, "up")

    def close(self) -> None:
        """End everything; harmless if it is over."""
        for machine in self.machines:
            machine.lose()
        self._switch.close()

    def _ip(self, *words: str, is_checked: bool = True) -> None:
        command = ["nsenter", "--target", str(self._switch.pid), "--net", "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if is_checked and done.returncode:
            raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")

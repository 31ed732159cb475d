"""Hosts on one machine: each a network, process and name space of its own, joined by a switch that can be unplugged.

    with Network() as network:
        one, two = network.add_host("one"), network.add_host("two")
        server = one.start(["python", "-m", "http.server"], log=folder / "one.log")
        network.unplug(one)      # packets are lost, no connection is closed: a pulled cable
        network.plug_in(one)
        two.power_off()          # every process of the host is gone at once

Every host has its own interface, loopback, address, process ids, host name and /proc; the file system is common, as a
network file system would be. This machine has an address in the network too, so a test talks to a host like anyone.

Nothing is left behind, however the test ends: the spaces have no names, so they go with their last process; a host's
first process dies with the process that made it (PR_SET_PDEATHSIG), and the kernel then kills all others of the host.
That holds for the thread that calls `add_host`, too: it must live as long as the network.

Needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN), `ip` (iproute2), `unshare`, `nsenter` and `setpriv` (util-linux).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

PROGRAMS = ("ip", "unshare", "nsenter", "setpriv")
_START_SECONDS = 30.0
_STOP_SECONDS = 20.0
_SPACES = ("--net", "--pid", "--uts", "--ipc", "--mount")
# The first process of a host adopts what loses its parent there, and must reap it.
_INIT = """
hostname "$0"; ip link set lo up
exec 3>"$1"; echo ready >&3; exec 3>&-
while :; do sleep 3600 & wait; done
"""


class HostsUnavailable(Exception):
    """This machine or its user cannot make hosts; the message says what is missing."""


def why_unavailable() -> str | None:
    """Returns why hosts cannot be made here, or None if they can."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"missing: {', '.join(missing)} (Debian's packages iproute2 and util-linux)"
    if os.geteuid() != 0:
        return "making network namespaces takes root"
    tried = subprocess.run(
        [
            "unshare",
            *_SPACES,
            "--fork",
            "--kill-child",
            "--mount-proc",
            "ip",
            "link",
            "add",
            "name",
            "probe",
            "type",
            "bridge",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"unshare or ip failed: {tried.stderr.strip()}"


class HostProcess:
    """A program that runs on a host. pid: as this machine counts; the host's own processes see another."""

    def __init__(self, entered: subprocess.Popen[bytes], pid: int, log: Path) -> None:
        self._entered, self.pid, self.log = entered, pid, log

    @property
    def is_running(self) -> bool:
        return self._entered.poll() is None

    def kill(self) -> None:
        """Kills the program and what it started in its own process group; nobody is told."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Asks the program to end, and kills it when it does not. Raises TimeoutExpired: it survives even that."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            # A signal to the group would end `nsenter` before the program.
            os.killpg(self._entered.pid, number) if number == signal.SIGKILL else os.kill(self.pid, number)
        try:
            self._entered.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._entered.pid, signal.SIGKILL)
            self._entered.wait(_STOP_SECONDS)

    def tail(self, num_lines: int = 30) -> str:
        """Returns the end of what the program printed."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


class Host:
    """One host of a network. address: its IPv4 address there."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._holder: subprocess.Popen[bytes] | None = None
        self._init_pid = 0

    @property
    def is_on(self) -> bool:
        return self._holder is not None and self._holder.poll() is None

    @property
    def init_pid(self) -> int:
        """The first process of the host, as this machine counts."""
        assert self.is_on, f"the host {self.name} is off"
        return self._init_pid

    def boot(self) -> None:
        """Makes the spaces and their first process. Raises HostsUnavailable: the kernel refuses."""
        assert not self.is_on, f"the host {self.name} is on"
        reading, writing = os.pipe()
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc"]
        command += ["bash", "-c", _INIT, self.name, f"/proc/self/fd/{writing}"]
        self._holder = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[writing], start_new_session=True
        )
        os.close(writing)
        with os.fdopen(reading) as pipe:
            line = pipe.readline()
        if line != "ready\n":
            self._holder.kill()
            raise HostsUnavailable(f"the host {self.name} did not start: {self._holder.communicate()[1].decode()}")
        self._init_pid = _only_child(self._holder.pid)

    def power_off(self) -> None:
        """Ends every process of the host at once; nobody is told."""
        if self._holder is not None:
            if self._holder.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._init_pid, signal.SIGKILL)
            self._holder.wait(_STOP_SECONDS)
            if self._holder.stderr is not None:
                self._holder.stderr.close()
            self._holder = None

    def enter(self, command: Sequence[str], *, user: int | None = None) -> list[str]:
        """Returns the command that runs a command on the host, as root or as another user (its number)."""
        entered = ["nsenter", "--target", str(self.init_pid), *_SPACES, f"--wdns={Path.cwd()}", "--"]
        drop = [] if user is None else ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]
        return [*entered, *drop, *command]

    def start(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        user: int | None = None,
    ) -> HostProcess:
        """Starts a program in the background. Its output goes to `log`, after what is there already."""
        with log.open("ab") as output:
            entered = subprocess.Popen(
                self.enter(command, user=user),
                env=None if environment is None else dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return HostProcess(entered, _only_child(entered.pid), log)

    def run(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, user: int | None = None
    ) -> str:
        """Runs a command to its end and returns what it printed. Raises AssertionError: it fails."""
        done = subprocess.run(
            self.enter(command, user=user),
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)} on {self.name} failed:\n{done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> list[int]:
        """Returns all processes of the host but its first, as this machine counts; that one waits by a `sleep`."""
        space = os.readlink(f"/proc/{self.init_pid}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns" / "pid") == space:
                    found.append(int(entry.name))
        return sorted(set(found) - {self.init_pid})


class Network:
    """A switch with hosts. Its addresses are of 198.18.0.0/15, which no real network uses (RFC 2544)."""

    def __init__(self) -> None:
        self._subnet = f"198.{random.choice((18, 19))}.{random.randrange(256)}"
        # Interfaces of this machine may have 15 characters.
        self._uplink = f"bm{os.getpid() % 100_000}x{random.randrange(16**4):04x}"
        self._switch = Host("switch", "")
        self.hosts: list[Host] = []

    @property
    def address(self) -> str:
        """Where hosts reach this machine."""
        return f"{self._subnet}.1"

    def __enter__(self) -> Network:
        if reason := why_unavailable():
            raise HostsUnavailable(reason)
        self._switch.boot()
        try:
            self._switch.run(["ip", "link", "add", "bridge", "type", "bridge", "forward_delay", "0"])
            self._switch.run(["ip", "link", "set", "bridge", "up"])
            # The pair goes with the switch, so that this machine keeps no interface.
            self._connect(self._uplink, os.getpid())
            _run(["ip", "address", "add", f"{self.address}/24", "dev", self._uplink])
            _run(["ip", "link", "set", self._uplink, "up"])
        except BaseException:
            self._switch.power_off()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.power_off()
        self._switch.power_off()

    def add_host(self, name: str) -> Host:
        """Makes a host, switched on and plugged in. name: up to eight letters, unlike all others'."""
        assert len(name) <= 8, name
        assert name not in {host.name for host in self.hosts}, name
        host = Host(name, f"{self._subnet}.{len(self.hosts) + 10}")
        self.hosts.append(host)
        self.power_on(host)
        return host

    def power_on(self, host: Host) -> None:
        """Switches a host on and plugs it in; nothing runs there yet."""
        host.boot()
        self._connect(f"{host.name}-up", host.init_pid)
        host.run(["ip", "link", "set", f"{host.name}-up", "name", "eth0"])
        host.run(["ip", "address", "add", f"{host.address}/24", "dev", "eth0"])
        host.run(["ip", "link", "set", "eth0", "up"])

    def unplug(self, host: Host) -> None:
        """Cuts a host off: packets to and from it are lost, and no connection is told."""
        self._switch.run(["ip", "link", "set", f"{host.name}-up-p", "down"])

    def plug_in(self, host: Host) -> None:
        """Joins a host to the network again."""
        self._switch.run(["ip", "link", "set", f"{host.name}-up-p", "up"])

    def _connect(self, name: str, pid: int) -> None:
        """Makes a cable from the switch to the network space of a process, where its end has this name."""
        port = f"{name[:13]}-p"
        add = ["ip", "link", "add", "name", port, "type", "veth", "peer", "name", name]
        self._switch.run(add)
        # By the number that this machine counts: the switch does not see the processes of others.
        _run(
            [
                "nsenter",
                "--target",
                str(self._switch.init_pid),
                "--net",
                "--",
                "ip",
                "link",
                "set",
                name,
                "netns",
                str(pid),
            ]
        )
        self._switch.run(["ip", "link", "set", port, "master", "bridge"])
        self._switch.run(["ip", "link", "set", port, "up"])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed: {done.stderr}"


def _only_child(pid: int) -> int:
    """Returns the process that another one forked: `unshare` and `nsenter` stand between us and what they run."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
        if children:
            return int(children[0])
        assert time.monotonic() < deadline, f"process {pid} started nothing"
        time.sleep(0.01)

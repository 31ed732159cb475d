"""Hosts in namespaces: that they are apart, can be cut off and switched off, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, Network, why_unavailable
from tests.waiting import wait_for

MAKER = """
import time
from pathlib import Path
from tests.cluster.hosts import Network
with Network() as network:
    host = network.add_host("one")
    host.start(["sleep", "600"], log=Path("/dev/null"))
    print(host.init_pid, *host.processes(), network._uplink, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _hosts_can_be_made() -> None:
    if reason := why_unavailable():
        pytest.skip(f"NO HOSTS: nothing was tried on several hosts; {reason}")


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as opened:
        yield opened


def reaches(one: Host, address: str, port: int = 8000) -> bool:
    """Returns whether a connection from a host to an address opens within a second."""
    program = f"import socket; socket.create_connection(('{address}', {port}), 1)"
    done = subprocess.run(one.enter([sys.executable, "-c", program]), capture_output=True, check=False)
    return done.returncode == 0


def test_a_host_that_is_cut_off_is_not_reached_until_it_is_plugged_in_again(network: Network, tmp_path: Path) -> None:
    one, two = network.add_host("one"), network.add_host("two")
    server = one.start([sys.executable, "-m", "http.server", "8000"], log=tmp_path / "log")
    wait_for(lambda: reaches(two, one.address))
    network.unplug(one)
    assert not reaches(two, one.address)
    assert reaches(one, "127.0.0.1"), "the host itself works on"
    network.plug_in(one)
    wait_for(lambda: reaches(two, one.address))
    assert server.is_running


def test_hosts_have_names_processes_and_loopback_of_their_own(network: Network, tmp_path: Path) -> None:
    one, two = network.add_host("one"), network.add_host("two")
    assert [host.run(["hostname"]).strip() for host in (one, two)] == ["one", "two"]
    process = one.start([sys.executable, "-m", "http.server", "8000"], log=tmp_path / "log")
    wait_for(lambda: reaches(one, "127.0.0.1"))
    assert not reaches(two, "127.0.0.1")
    assert process.pid in one.processes()
    assert process.pid not in two.processes()


def test_a_host_that_is_switched_off_loses_every_process_and_comes_back_empty(network: Network, tmp_path: Path) -> None:
    one = network.add_host("one")
    # In a session of its own, so that no signal to a group reaches it.
    process = one.start(["bash", "-c", "setsid sleep 600 & sleep 600"], log=tmp_path / "log")
    wait_for(lambda: len(one.processes()) >= 4)
    before = one.processes()
    one.power_off()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))
    assert not process.is_running
    network.power_on(one)
    assert not set(one.processes()) & set(before)
    assert len(one.processes()) <= 1, "what its first process waits by"


def test_a_program_is_run_as_another_user(network: Network) -> None:
    one = network.add_host("one")
    assert one.run(["id", "-u"], user=65534).strip() == "65534"
    with pytest.raises(AssertionError, match="on one failed"):
        one.run(["false"])


def test_nothing_is_left_when_who_made_the_hosts_is_killed() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", MAKER], env=environment, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        *pids, uplink = maker.stdout.readline().split()
        assert len(pids) >= 2
        assert Path(f"/sys/class/net/{uplink}").exists()
        maker.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    wait_for(lambda: not Path(f"/sys/class/net/{uplink}").exists())

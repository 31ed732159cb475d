"""Curations on several hosts, each disturbed by one failure: they end by themselves, alike, and pay nothing twice.

    python -m benchmarks.many_hosts [--rows 60] [--only NAME ...]        root, Linux; about two minutes a failure

Prefect's server, PostgreSQL and the watch over runs are on one host, two workers and two teachers on four others: the
network namespaces of `tests.cluster`. The file system is common to them, as an NFS mount would be. For each failure a
curation is started in a work folder of its own, and disturbed once some replies are durable. Claims:

- It ends without anybody's doing, its corpus is byte for byte that of an undisturbed run on one machine, and no reply
  that was durable is asked for again.
- Work goes on within 60 seconds: no longer passes between two calls to a teacher, besides the time in which the
  server was kept away on purpose. The undisturbed run says what the pauses between stages are.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cards import MODEL, configuration, curate_plainly, table_lines, teacher_answer, write_cards
from benchmarks.killing import corpus_fingerprint
from corpus.versions import latest_version
from flows.run_config import corpus_folder
from teacher.fault_server import FaultServer
from tests.cluster import hosts, postgres
from tests.cluster.cluster import Cluster, running_cluster
from tests.cluster.hosts import Host, Network
from tests.cluster.paid_replies import PaidReplies

RESULT = Path(__file__).parent / "results" / "many_hosts.json"
AIM_SECONDS = 60.0
_PAID_BEFORE = 30
"""Replies that are durable before anything happens."""
_LATENCY_SECONDS = 0.4


class Installation:
    """What a failure may lay its hands on."""

    def __init__(self, network: Network, cluster: Cluster) -> None:
        self.network, self.cluster = network, cluster

    def cut_off(self, host: Host, seconds: float) -> None:
        self.network.unplug(host)
        time.sleep(seconds)
        self.network.plug_in(host)

    def switch_off(self, host: Host, seconds: float, *programs: Callable[[], None]) -> None:
        """Takes the power from a host for some time; its programs start again with it."""
        host.power_off()
        time.sleep(seconds)
        self.network.power_on(host)
        for start in programs:
            start()


def nothing(installation: Installation) -> None:
    del installation


def worker_off(installation: Installation) -> None:
    cluster, host = installation.cluster, installation.cluster.host_of_run()
    installation.switch_off(host, 60, lambda: cluster.start_worker(host))


def worker_cut_off(seconds: float) -> Callable[[Installation], None]:
    return lambda installation: installation.cut_off(installation.cluster.host_of_run(), seconds)


def worker_killed(installation: Installation) -> None:
    """The worker and what else is in its process group; its flow run is heard of no more."""
    cluster, host = installation.cluster, installation.cluster.host_of_run()
    cluster.process(host, "worker").kill()
    time.sleep(20)
    cluster.start_worker(host)


def run_killed(installation: Installation) -> None:
    installation.cluster.kill_flow_runs(installation.cluster.host_of_run())


def server_killed(seconds: float) -> Callable[[Installation], None]:
    def kill(installation: Installation) -> None:
        installation.cluster.process(installation.cluster.control, "server").kill()
        time.sleep(seconds)
        installation.cluster.start_server()

    return kill


def database_killed(installation: Installation) -> None:
    installation.cluster.postgres.kill()
    time.sleep(5)
    installation.cluster.postgres.start()


def control_off(installation: Installation) -> None:
    installation.switch_off(installation.cluster.control, 10, installation.cluster.start_control)


def teacher_off(installation: Installation) -> None:
    cluster = installation.cluster
    installation.switch_off(cluster.teachers[0], 30, lambda: cluster.start_teacher(cluster.teachers[0]))


def teacher_cut_off(installation: Installation) -> None:
    installation.cut_off(installation.cluster.teachers[0], 60)


FAILURES: dict[str, Callable[[Installation], None]] = {
    "no failure": nothing,
    "worker's host off": worker_off,
    "worker's host cut off for 10 s": worker_cut_off(10),
    "worker's host cut off for 120 s": worker_cut_off(120),
    "worker killed": worker_killed,
    "flow run killed": run_killed,
    "server killed, back at once": server_killed(0),
    "server killed, back after 60 s": server_killed(60),
    "database killed, back after 5 s": database_killed,
    "server and database off for 10 s": control_off,
    "teacher's host off for 30 s": teacher_off,
    "teacher's host cut off for 60 s": teacher_cut_off,
}


AWAY_SECONDS = {
    "server killed, back after 60 s": 60.0,
    "database killed, back after 5 s": 5.0,
    "server and database off for 10 s": 10.0,
}
"""For so long the server is kept away; stages cannot begin then, and nothing to recover to is there."""


@dataclass(slots=True)
class Outcome:
    """What one failure did. asked_again: durable replies, in words.

    pause_seconds: the longest between two calls, without the time in which the server was kept away.
    """

    failure: str
    states: list[str]
    restarts: int
    seconds: float
    pause_seconds: float
    durable: int
    is_same_corpus: bool
    asked_again: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return self.is_same_corpus and not self.asked_again and "COMPLETED" in self.states


def disturb(installation: Installation, failure: str, cards: Path, reference: dict[str, str]) -> Outcome:
    """Runs one curation with one failure and returns what became of it."""
    cluster = installation.cluster
    name = failure.replace(" ", "-").replace("'", "").replace(",", "")
    known = {run["id"] for run in cluster.runs()}
    config = cluster.write_config(cards, name)
    paid, began = PaidReplies(cluster, config), time.monotonic()
    cluster.start_run(name)
    cluster.wait_for(lambda: paid.note() >= _PAID_BEFORE, "the first replies", cluster.logs)
    FAILURES[failure](installation)
    paid.note()
    runs = [run for run in cluster.wait_until_quiet() if run["id"] not in known]
    seconds = time.monotonic() - began
    version = latest_version(corpus_folder(config))
    return Outcome(
        failure,
        [run["state_type"] for run in runs],
        sum("restart" in run["tags"] for run in runs),
        round(seconds, 1),
        round(max(0.0, paid.longest_pause_seconds() - AWAY_SECONDS.get(failure, 0.0)), 1),
        paid.num_durable,
        version is not None and corpus_fingerprint(Path(version)) == reference,
        paid.asked_again(),
    )


def undisturbed_corpus(cards: Path, folder: Path) -> dict[str, str]:
    """Returns what a run on one machine makes of the cards, without Prefect."""
    with FaultServer(teacher_answer, models=[MODEL], keep_calls=False) as server:
        return corpus_fingerprint(curate_plainly(configuration(cards, folder, server.url)).folder)


def render(outcomes: list[Outcome]) -> str:
    width = max(len(outcome.failure) for outcome in outcomes)
    lines = [f"{'failure':<{width}}  pause  whole  restarts  corpus     asked again"]
    for outcome in outcomes:
        corpus = "identical" if outcome.is_same_corpus else "DIFFERENT"
        lines.append(
            f"{outcome.failure:<{width}}  {outcome.pause_seconds:>4.0f} s {outcome.seconds:>4.0f} s  "
            f"{outcome.restarts:>8}  {corpus}  {len(outcome.asked_again):>11}"
        )
    late = sum(outcome.pause_seconds > AIM_SECONDS for outcome in outcomes)
    return "\n".join([*lines, *table_lines([(f"failures after which work paused over {AIM_SECONDS:.0f} s", late)])])


def record_of(outcomes: list[Outcome], num_rows: int, loads: list[float]) -> dict[str, Any]:
    return {
        "command": f"python -m benchmarks.many_hosts --rows {num_rows}",
        "processors": os.cpu_count(),
        "load_average_seen": [round(min(loads), 1), round(max(loads), 1)],
        "failures": [{**asdict(outcome), "asked_again": len(outcome.asked_again)} for outcome in outcomes],
    }


def main() -> int:
    """Returns 1 if a corpus differed, a durable reply was paid for again, or no run ended well; 2 without hosts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60, help="cards in each curation")
    parser.add_argument("--only", action="append", choices=list(FAILURES), help="this failure alone; may be repeated")
    options = parser.parse_args()
    if reason := hosts.why_unavailable() or postgres.why_unavailable():
        print(f"no hosts can be made here: {reason}")
        return 2
    outcomes, loads = [], []
    with postgres.open_folder() as folder:
        cards = write_cards(folder / "cards", options.rows)
        reference = undisturbed_corpus(cards, folder / "reference")
        with running_cluster(folder, latency_seconds=_LATENCY_SECONDS) as (network, cluster):
            for failure in options.only or FAILURES:
                outcomes.append(disturb(Installation(network, cluster), failure, cards, reference))
                loads.append(os.getloadavg()[0])
                print(render(outcomes[-1:]), *outcomes[-1].asked_again[:5], sep="\n", flush=True)
    print(render(outcomes))
    if options.only is None:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(record_of(outcomes, options.rows, loads), indent=2) + "\n", encoding="utf-8")
    return 0 if all(outcome.is_right for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())

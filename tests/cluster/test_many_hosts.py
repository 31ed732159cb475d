"""One curation on several hosts, disturbed: `python -m benchmarks.many_hosts` does the same with every failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cards import MODEL, configuration, curate_plainly, teacher_answer, write_cards
from benchmarks.killing import corpus_fingerprint
from corpus.versions import latest_version
from flows.run_config import corpus_folder
from teacher.fault_server import FaultServer
from tests.cluster import hosts, postgres
from tests.cluster.cluster import Cluster, running_cluster
from tests.cluster.paid_replies import PaidReplies

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installation() -> Iterator[tuple[hosts.Network, Cluster]]:
    if reason := hosts.why_unavailable() or postgres.why_unavailable():
        pytest.skip(f"NO HOSTS: nothing was tried on several hosts; {reason}")
    with (
        postgres.open_folder() as folder,
        running_cluster(folder, latency_seconds=0.15, silence_seconds=12) as (network, cluster),
    ):
        yield network, cluster


def undisturbed_corpus(cards: Path, folder: Path) -> dict[str, str]:
    """Returns what a run on one machine makes of the cards, without Prefect and without a failure."""
    with FaultServer(teacher_answer, models=[MODEL], keep_calls=False) as server:
        return corpus_fingerprint(curate_plainly(configuration(cards, folder, server.url)).folder)


def test_a_run_outlives_its_server_and_its_host_and_ends_with_the_same_corpus_paying_for_nothing_twice(
    installation: tuple[hosts.Network, Cluster],
) -> None:
    network, cluster = installation
    cards = write_cards(cluster.folder / "cards", 40)
    config = cluster.write_config(cards, "disturbed")
    first = cluster.start_run("disturbed")
    undisturbed, paid = undisturbed_corpus(cards, cluster.folder / "calm"), PaidReplies(cluster, config)
    cluster.wait_for(lambda: paid.note() >= 15, "the first replies", cluster.logs)
    cluster.process(cluster.control, "server").kill()
    cluster.start_server()
    host = cluster.host_of_run()
    network.unplug(host)
    paid.note()
    runs = cluster.wait_until_quiet()
    network.plug_in(host)

    (again,) = (run for run in runs if "restart" in run["tags"])
    assert f"restart-of:{first}" in again["tags"]
    assert (cluster.run(first)["state_type"], again["state_type"]) == ("CRASHED", "COMPLETED"), cluster.logs()
    version = latest_version(corpus_folder(config))
    assert version is not None
    assert corpus_fingerprint(Path(version)) == undisturbed
    assert paid.asked_again() == []

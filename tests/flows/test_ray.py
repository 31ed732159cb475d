"""The flow on a real Ray cluster of several nodes on this machine, one of which is lost in the middle of a stage."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cards import curate_plainly
from flows.curate import curate
from flows.ray_crew import Board, Report
from flows.run_config import load_run
from schemas.errors import ConfigError, TeacherMisconfigured
from schemas.usage import Usage, UsageKey
from tests.flows.scripted_world import scripted_answer, write_config, write_questions
from tests.replay_teacher import ReplayTeacher

pytestmark = [pytest.mark.usefixtures("prefect"), pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose head node does no work; tests add the nodes that do."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield started
    started.shutdown()


@pytest.fixture
def nodes(cluster: Any) -> Iterator[list[Any]]:
    added = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    yield added
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)


def questions_with_copies(folder: Path) -> Path:
    """Writes questions of which some are another's copy, near or exact."""
    path = write_questions(folder, 60)
    long = "Explain in all detail how the thing on the left of the picture is held up by the other thing behind it"
    lines = [
        '{"id": "c1", "question": "What is the sum of 3 and 7?", "answer": "10"}',
        '{"id": "c2", "question": "what is  the sum of 3 and 7 ?", "answer": "10"}',
        f'{{"id": "c3", "question": "{long} today"}}',
        f'{{"id": "c4", "question": "{long} now"}}',
        '{"id": "bad", "question": ""}',
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def corpus_files(folder: str) -> dict[str, bytes]:
    paths = [Path(folder, "fates.parquet"), *Path(folder, "data").rglob("*.parquet")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def plain_corpus(folder: Path, questions: Path, url: str) -> dict[str, bytes]:
    folder.mkdir()
    record = curate_plainly(load_run(str(write_config(folder, questions, url, shard_rows=6)))).to_record()
    return corpus_files(record["corpus"])


def ray_config(folder: Path, questions: Path, url: str, address: str, **settings: Any) -> Path:
    folder.mkdir()
    return write_config(folder, questions, url, shard_rows=6, parallel_shards=1, ray={"address": address}, **settings)


def test_a_cluster_makes_the_same_corpus_and_counts_what_it_paid(tmp_path: Path, cluster: Any, nodes: Any) -> None:
    questions = questions_with_copies(tmp_path / "in")
    with ReplayTeacher(scripted_answer, models=["scripted"]) as teacher:
        expected = plain_corpus(tmp_path / "plain", questions, teacher.url)
        num_plain = len(teacher.calls)
        result = curate(str(ray_config(tmp_path / "ray", questions, teacher.url, cluster.address)))
        num_calls = len(teacher.calls) - num_plain
    assert corpus_files(result["corpus"]) == expected
    assert result["new_teacher_calls"] == num_calls
    assert not list(Path(tmp_path, "ray").rglob("pieces")), "what was dealt out is cleaned up"


def test_a_node_lost_in_the_middle_of_a_stage_costs_only_what_was_in_flight(
    tmp_path: Path, cluster: Any, nodes: list[Any]
) -> None:
    questions = questions_with_copies(tmp_path / "in")

    with ReplayTeacher(scripted_answer, models=["scripted"]) as teacher:
        expected = plain_corpus(tmp_path / "plain", questions, teacher.url)
        num_plain = len(teacher.calls)
    with ReplayTeacher(scripted_answer, models=["scripted"], delay_seconds=0.05) as teacher:
        lost = threading.Event()

        def lose_a_node() -> None:
            while len(teacher.calls) < num_plain // 3:
                time.sleep(0.05)
            cluster.remove_node(nodes[0], allow_graceful=False)
            lost.set()

        killer = threading.Thread(target=lose_a_node, daemon=True)
        killer.start()
        result = curate(str(ray_config(tmp_path / "ray", questions, teacher.url, cluster.address)))
        killer.join()
        repeated = Counter(call.digest for call in teacher.calls)
    assert lost.is_set()
    assert corpus_files(result["corpus"]) == expected
    # One shard of six rows, of eight samples each at most, was in flight on the node.
    assert sum(count - 1 for count in repeated.values()) <= 6 * 8


def test_an_error_of_a_worker_is_the_error_of_the_run(tmp_path: Path, cluster: Any, nodes: Any) -> None:
    questions = write_questions(tmp_path / "in", 8)
    with ReplayTeacher(scripted_answer, models=["another"]) as teacher:
        config = ray_config(tmp_path / "ray", questions, teacher.url, cluster.address)
        with pytest.raises(TeacherMisconfigured, match="another"):
            curate(str(config))


def test_a_cluster_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "in", 4)
    config = ray_config(tmp_path / "ray", questions, "http://127.0.0.1:9/v1", "127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"no Ray cluster at ray\.address"):
        curate(str(config))


def test_a_server_beside_the_flow_is_refused_with_a_cluster(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "in", 4)
    path = write_config(tmp_path, questions, "http://127.0.0.1:9/v1", ray={}, serve={"port": 8000})
    with pytest.raises(ConfigError, match=r"teacher\.more_urls"):
        load_run(str(path))


def test_the_board_takes_rows_of_the_last_try_and_what_all_paid() -> None:
    board, key = Board(), UsageKey("routing", "topic", "sums", "scripted")
    paid = {key: Usage(num_calls=2)}
    board.put("one", "first", Report(5, 1, paid))
    board.put("one", "second", Report(2, 0, paid, 3, 4))
    board.put("two", "first", Report(7, 7))
    total = board.total()
    assert (total.num_done, total.num_skipped, total.num_in_flight, total.num_waiting) == (9, 7, 3, 4)
    assert total.paid[key].num_calls == 4
    board.clear()
    assert board.total() == Report()

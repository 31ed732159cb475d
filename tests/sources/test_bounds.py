"""What hostile files unpack to, and what hostile rows name: bounded, and never fetched."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sources import parquet
from tests.sources.conftest import Bench

READ = """
import resource, sys
from schemas.config import ImageLimits, parse_config
from sources import ImageStore, plan_units, read_unit
from pathlib import Path
path, stored_as, folder = sys.argv[1:]
config = parse_config({"sources": [{"name": "s", "format": stored_as, "path": path}]})
outcome = []
for unit in plan_units(config):
    samples, fates = read_unit(unit, config, ImageStore(Path(folder), config.images))
    outcome += [sample.question for sample in samples] + [fate.reason for fate in fates]
print(len(outcome), *sorted(set(outcome)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def outcome_and_peak(path: Path, stored_as: str) -> tuple[list[str], int]:
    """Reads a source in a process of its own; returns how many rows came of it and which, and its peak in MiB."""
    command = [sys.executable, "-c", READ, str(path), stored_as, str(path.parent / "images")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    *outcome, peak = done.stdout.split()
    return outcome, int(peak)


@pytest.fixture(scope="module")
def usual_peak(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What reading a small source takes, most of it libraries."""
    path = tmp_path_factory.mktemp("usual") / "rows.jsonl"
    path.write_text('{"question": "fine"}\n')
    return outcome_and_peak(path, "jsonl")[1]


@pytest.mark.parametrize("pages", ["dictionary", "plain"])
def test_a_few_kilobytes_of_parquet_cannot_fill_the_memory(tmp_path: Path, usual_peak: int, pages: str) -> None:
    rows = pa.chunked_array([pa.array(["a" * 60_000_000])] * 60, pa.string())
    path = tmp_path / "bomb.parquet"
    limit = 2**30 if pages == "dictionary" else None
    table = pa.table({"question": rows.cast(pa.large_string())})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=limit, use_dictionary=pages != "plain")
    assert path.stat().st_size < 500_000
    outcome, peak = outcome_and_peak(path, "parquet")
    assert outcome == ["60", "question_too_long"]
    assert peak - usual_peak < 700  # decoded at once, 32 rows of it would take 1,900


def test_a_gzip_file_of_one_endless_line_cannot_fill_the_memory(tmp_path: Path, usual_peak: int) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(12):
            file.write(b"a" * 2**26)
        file.write(b'\n{"question": "fine"}\n')
    assert path.stat().st_size < 5_000_000
    outcome, peak = outcome_and_peak(path, "jsonl")
    assert outcome == ["2", "fine", "row_too_large"]
    assert peak - usual_peak < 600  # unpacked it has 768


def test_a_row_group_whose_rows_are_beyond_all_bounds_is_quarantined_undecoded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.folder / "rows.parquet"
    with pq.ParquetWriter(path, pa.schema([("question", pa.string())])) as writer:
        for texts in (["one", "two"], ["x" * 3000, "y" * 3000], ["three"]):
            writer.write_table(pa.table({"question": texts}))
    monkeypatch.setattr(parquet, "MAX_ROW_BYTES", 1000)
    outcome = bench.read(path, stored_as="parquet", shard_rows=2)
    assert [sample.question for sample in outcome.samples] == ["one", "two", "three"]
    assert outcome.reasons == ["row_too_large"] * 2


def test_a_single_row_beyond_all_bounds_is_quarantined(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.folder / "rows.parquet"
    pq.write_table(pa.table({"question": [f"q{n}" for n in range(30)] + ["x" * 3000] + ["end"]}), path)
    monkeypatch.setattr(parquet, "MAX_ROW_BYTES", 1000)
    outcome = bench.read(path, stored_as="parquet")
    assert len(outcome.samples) == 31 and outcome.reasons == ["row_too_large"]


@pytest.mark.parametrize("batch_bytes", [1, 200, 10**9])
def test_rows_do_not_depend_on_how_many_are_decoded_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, batch_bytes: int
) -> None:
    path = bench.folder / "rows.parquet"
    texts = [f"question {number}" for number in range(100)]
    pq.write_table(pa.table({"question": texts, "spare": ["z" * 100] * 100}), path, row_group_size=17)
    monkeypatch.setattr(parquet, "_BATCH_BYTES", batch_bytes)
    outcome = bench.read(path, stored_as="parquet", shard_rows=13)
    assert [sample.question for sample in outcome.samples] == texts


class Counting(BaseHTTPRequestHandler):
    """Notes whoever asks for anything."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def counting() -> Iterator[tuple[int, list[str]]]:
    """A server on the loopback interface; yields its port and what it was asked for."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Counting,), {"asked": asked}))
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], asked
    server.shutdown()
    server.server_close()


def test_no_address_in_a_row_is_ever_asked(bench: Bench, counting: tuple[int, list[str]]) -> None:
    port, asked = counting
    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "[::ffff:127.0.0.1]", "127.1"]
    addresses = [f"http://{host}:{port}/image.png" for host in hosts]
    addresses += [f" HTTP://127.0.0.1:{port}/b.png"]
    values: list[object] = [*addresses, *({"url": address} for address in addresses)]
    values += [{"path": addresses[0], "bytes": None}, json.dumps([addresses[0]]), [addresses[0], addresses[1]]]
    values.append(f"simplecache::http://127.0.0.1:{port}/a.png")  # to fsspec alone an address; here a file's name
    rows = [{"question": f"q{number}", "image": value} for number, value in enumerate(values)]
    outcome = bench.read(bench.lines(*rows), columns={"images": "image"})
    assert outcome.reasons == ["image_address_not_fetched"] * (len(values) - 1) + ["image_missing"]
    assert asked == []

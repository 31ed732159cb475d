"""`bimode plan` as its user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from flows.commands import plan

VERSION = Path(__file__).parents[1] / "planning" / "finished_run" / "v0002"


def run(*arguments: object) -> Result:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command(epilog=plan.EXAMPLES)(plan.plan)
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def recorded(*arguments: object) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    record: dict[str, object] = json.loads(result.stdout)
    return record


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(
        """
        shard_rows: 500
        parallel_shards: 6
        sources: [{name: rows, format: jsonl, path: rows.jsonl, topic: math, columns: {images: image}}]
        prices: {gpu_hour: 3.0, completion: 1.5}
        """,
        encoding="utf-8",
    )
    return path


def test_rows_and_gpus_are_enough() -> None:
    result = run("--rows", 16_400_000, "--gpus", 8, "--gpu-hour-price", 2.5)
    assert result.exit_code == 0, result.output
    assert "cost of the GPUs" in result.stdout and "breaks first" in result.stdout
    assert "Assumptions:" not in result.stdout and "Simulated" not in result.stdout


def test_everything_may_be_shown_at_once() -> None:
    result = run("--rows", 1_000_000, "--gpus", 2, "--nightly-rows", 1000, "--explain", "--simulate", "--seed", 3)
    assert result.exit_code == 0, result.output
    for part in ("A night that adds 1,000 rows", "Simulated, seed 3", "Assumptions:", "duplicate_share"):
        assert part in result.stdout


def test_settings_prices_and_what_the_sources_settle_come_from_the_configuration(config: Path) -> None:
    record = recorded("--rows", 10_000, "--gpus", 2, "--config", config)
    assert (record["shard_rows"], record["parallel_shards"]) == (500, 6)
    assert record["cost"]["gpus"]["expected"] == pytest.approx(3 * record["total"]["held_gpu_hours"]["expected"])
    assert record["cost"]["tokens"]["expected"] == pytest.approx(
        1.5 * record["total"]["completion_tokens"]["expected"] / 1e6
    )
    topics = next(each for each in record["assumptions"] if each["name"] == "asks_topic_share")
    assert topics["high"] == 0 and topics["source"] == "the sources of the configuration"
    other = recorded("--rows", 10_000, "--gpus", 2, "--config", config, "--gpu-hour-price", 6)
    assert other["cost"]["gpus"]["expected"] == pytest.approx(2 * record["cost"]["gpus"]["expected"])


def test_shares_and_lengths_come_from_a_finished_run() -> None:
    record = recorded("--rows", 10_000, "--gpus", 2, "--from", VERSION)
    measured = [each for each in record["assumptions"] if each["source"].startswith("measured: sampleworld v0002")]
    assert {"duplicate_share", "answer_tokens", "image_bytes"} <= {each["name"] for each in measured}


def test_json_holds_night_limits_and_simulation() -> None:
    record = recorded("--rows", 1_000_000, "--gpus", 8, "--nightly-rows", 50_000, "--simulate")
    assert record["nightly"]["rows"] == 50_000
    assert record["limits"][0]["load"] >= record["limits"][-1]["load"]
    assert record["simulation"]["hours"] >= record["simulation"]["least_hours"] > 0
    assert record == recorded("--rows", 1_000_000, "--gpus", 8, "--nightly-rows", 50_000, "--simulate")


def test_another_model_and_kind_of_gpu() -> None:
    record = recorded("--rows", 1000, "--gpus", 8, "--gpu", "l40s", "--model", "Qwen/Qwen2.5-VL-7B-Instruct")
    assert (record["gpu"], record["copies"], record["gpus_per_copy"]) == ("L40S", 8, 1)
    ray = recorded("--rows", 10**7, "--gpus", 8, "--processes", 16, "--cores", 40)
    assert ray["processes"] == 16 and ray["driver_memory_bytes"]["traces"]["expected"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rows", 0, "--gpus", 8), "0 rows on 8 GPUs: both must be at least 1"),
        (("--rows", 5, "--gpus", 0), "5 rows on 0 GPUs: both must be at least 1"),
        (("--rows", 5, "--gpus", 1, "--model", "Qwen/Qwen2.5-VL-72B-Instruct"), "does not fit on 1 x H100"),
        (("--rows", 5, "--gpus", 1, "--model", "un/known"), "nothing is known of the model 'un/known'"),
        (("--rows", 5, "--gpus", 1, "--gpu", "V100"), "unknown kind of GPU 'V100'"),
        (("--rows", 5, "--gpus", 2, "--gpu-hour-price", -1), "--gpu-hour-price -1.0 must be a number from 0"),
        (("--rows", 5, "--gpus", 2, "--gpu-hour-price", "nan"), "--gpu-hour-price nan must be a number from 0"),
        (("--rows", 5, "--gpus", 2, "--cores", 0), "--cores 0"),
        (("--rows", 5, "--gpus", 2, "--processes", 0), "--processes 0"),
        (("--rows", 5, "--gpus", 2, "--memory-gib", "inf"), "--memory-gib inf"),
        (("--rows", 5, "--gpus", 2, "--nightly-rows", -3), "--nightly-rows -3"),
        (("--rows", 5, "--gpus", 2, "--seed", -3), "--seed -3"),
        (("--rows", 5, "--gpus", 2, "--config", "missing.yaml"), "missing.yaml"),
        (("--rows", 5, "--gpus", 2, "--from", "missing"), "missing"),
    ],
)
def test_bad_values_are_named_and_end_with_status_2(arguments: tuple[object, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and said in result.stderr and result.stdout == ""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from sampleworld.rows import write_rows
from schemas.errors import ConfigError, Interrupted, TrainingError
from schemas.template import FORCED_PREFIX, ThinkingMode, render_completion
from training import programs
from training.annealing import AnnealingConfig, anneal
from training.checkpoints import prepare_model
from training.programs import RunFolder, load_program_config
from training.rows import load_rows

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "rows.parquet"
    write_rows(path, "looking", seed=0, batch_rows=8, num_rows=64)
    return path


def config(model: Path, corpus: Path, output: Path, **settings: Any) -> AnnealingConfig:
    fixed = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-3, "log_steps": 1, "save_steps": 3}
    return AnnealingConfig(model=str(model), corpus=[str(corpus)], output=str(output), **{**fixed, **settings})


def test_a_run_leaves_a_model_metrics_and_last_a_result(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    result = anneal(config(small_model, corpus, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result["steps"] == 6
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


def test_a_finished_run_is_not_repeated(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    settings = config(small_model, corpus, tmp_path / "run")
    first = anneal(settings)
    assert anneal(settings) == first


def anneal_until_step_five(settings: AnnealingConfig) -> None:
    """Trains as configured and dies after step five, two steps after the first checkpoint."""
    log = programs.MetricsFile.on_log

    def dies_at_step_five(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        log(self, args, state, control, **rest)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.MetricsFile, "on_log", dies_at_step_five)
        with pytest.raises(KeyboardInterrupt):
            anneal(settings)


def test_a_run_that_died_goes_on_from_its_newest_checkpoint(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    anneal_until_step_five(config(small_model, corpus, tmp_path / "run"))
    assert not (tmp_path / "run" / "result.json").exists()
    assert anneal(config(small_model, corpus, tmp_path / "run"))["steps"] == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 4, 5, 6]


def test_a_run_that_died_ends_with_the_weights_of_one_that_did_not(
    small_model: Path, corpus: Path, tmp_path: Path
) -> None:
    whole, resumed = (config(small_model, corpus, tmp_path / name) for name in ("whole", "died"))
    anneal(whole)
    anneal_until_step_five(resumed)
    anneal(resumed)
    expected, found = (load_file(Path(run.output, "model", "model.safetensors")) for run in (whole, resumed))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_checkpoint_whose_saving_was_interrupted_is_passed_over(tmp_path: Path) -> None:
    for number, last_file in ((9, "trainer_state.json"), (10, "trainer_state.json"), (11, "optimizer.pt")):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / last_file).touch()
    assert RunFolder(tmp_path).newest_checkpoint() == str(tmp_path / "checkpoint-10")


def test_a_loss_that_is_not_finite_ends_the_run(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="loss is"):
        anneal(config(small_model, corpus, tmp_path / "run", learning_rate=1e30, max_steps=20))


@pytest.mark.parametrize("columns", [["prompt"], ["prompt", "images"]])
def test_a_corpus_without_its_columns_is_refused(corpus: Path, tmp_path: Path, columns: list[str]) -> None:
    pq.write_table(pq.read_table(corpus).select(columns), tmp_path / "part.parquet")
    with pytest.raises(TrainingError, match="completion"):
        load_rows([str(tmp_path / "part.parquet")])


def test_a_missing_corpus_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no corpus file"):
        load_rows([str(tmp_path / "none.parquet")])


def test_a_missing_checkpoint_is_a_clear_error(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint"):
        anneal(config(tmp_path / "none", corpus, tmp_path / "run"))


def test_an_unknown_setting_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "annealing.yaml"
    path.write_text("model: m\ncorpus: [c]\noutput: o\nlerning_rate: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="lerning_rate"):
        load_program_config(path, AnnealingConfig)


def test_the_choice_between_the_modes_is_one_token(small_model: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(small_model).tokenizer
    think, direct = (tokenizer.encode(render_completion("7", thought)) for thought in ("a", ""))
    opening, newline, blank = (tokenizer.encode(text) for text in ("<think>", "\n", "\n\n"))
    assert (len(opening), len(newline), len(blank)) == (1, 1, 1)
    assert think[:2] == [*opening, *newline]
    assert direct[:2] == [*opening, *blank]
    assert tokenizer.decode(direct, skip_special_tokens=True) == "<think>\n\n</think>7"


@pytest.mark.parametrize("mode", list(ThinkingMode))
def test_a_forced_prefix_has_the_tokens_of_the_completion_it_begins(small_model: Path, mode: ThinkingMode) -> None:
    tokenizer = AutoProcessor.from_pretrained(small_model).tokenizer
    completion = tokenizer.encode(render_completion("7", "a" if mode is ThinkingMode.LONG else ""))
    prefix = tokenizer.encode(FORCED_PREFIX[mode])
    assert completion[: len(prefix)] == prefix


def test_the_empty_think_block_carries_loss(small_model: Path, corpus: Path) -> None:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    model, processor = prepare_model(str(small_model), bf16=False)
    del model
    rows = load_rows([str(corpus)])
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([rows[0]])
    labels = batch["labels"][0]
    learned = processor.tokenizer.decode(labels[labels != -100])
    assert learned.startswith("\n\n</think>")


def test_a_stopped_run_writes_a_checkpoint_and_goes_on_from_it(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    settings = config(small_model, corpus, tmp_path / "run", save_steps=100)
    log = programs.MetricsFile.on_log

    def signals_at_step_two(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        log(self, args, state, control, **rest)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.MetricsFile, "on_log", signals_at_step_two)
        with pytest.raises(Interrupted, match="run it again"):
            anneal(settings)
    folder = RunFolder(tmp_path / "run")
    assert folder.newest_checkpoint() is not None
    assert folder.result() is None
    assert anneal(settings)["steps"] == 6

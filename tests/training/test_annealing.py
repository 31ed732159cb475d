from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from tokenizers import normalizers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from sampleworld.rows import write_rows
from schemas.errors import ConfigError, Interrupted, StorageError, TrainingError
from schemas.template import FORCED_PREFIX, ThinkingMode, render_completion
from tests.training.corpora import Row, png, write_corpus
from training import programs
from training.annealing import AnnealingConfig, anneal, training_rows
from training.checkpoints import prepare_model
from training.lora import LoraSettings
from training.parts import Part, parts_of
from training.programs import RunFolder, load_program_config
from training.rows import load_rows, measure_rows, without_thoughts
from training.strategies import Strategy

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


def anneal_until(step: int, settings: AnnealingConfig) -> None:
    """Trains as configured and dies after this step."""
    log = programs.MetricsFile.on_log

    def dies(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        log(self, args, state, control, **rest)
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.MetricsFile, "on_log", dies)
        with pytest.raises(KeyboardInterrupt):
            anneal(settings)


def weights(run: AnnealingConfig | Path) -> dict[str, torch.Tensor]:
    folder = run if isinstance(run, Path) else Path(run.output, "model")
    loaded: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return loaded


def test_a_run_that_died_goes_on_from_its_newest_checkpoint(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    anneal_until(5, config(small_model, corpus, tmp_path / "run"))
    assert not (tmp_path / "run" / "result.json").exists()
    assert anneal(config(small_model, corpus, tmp_path / "run"))["steps"] == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 4, 5, 6]


def test_a_run_that_died_ends_with_the_weights_of_one_that_did_not(
    small_model: Path, corpus: Path, tmp_path: Path
) -> None:
    whole, resumed = (config(small_model, corpus, tmp_path / name) for name in ("whole", "died"))
    anneal(whole)
    anneal_until(5, resumed)
    anneal(resumed)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=1e-6)


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
    with pytest.raises(TrainingError, match="no corpus file"):
        load_rows([str(tmp_path / "*" / "*.parquet")])


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


# To the token: what carries loss, and that every mode has the tokens it has elsewhere.


def collated(processor: Any, rows: list[Any]) -> Any:
    return DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(rows)


def one_row(path: Path, row: Row) -> Any:
    return load_rows([str(write_corpus(path, [row]))])[0]


@pytest.mark.parametrize(
    ("row", "shown", "learned"),
    [
        (
            Row(question="How many?", images=(png(56, 56),)),
            f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>How many?<|im_end|>\n"
            "<|im_start|>assistant\n<think>",
            ["\n\n", "</think>", "7", "<|im_end|>", "\n"],
        ),
        (
            Row(question="How many?", thought="3 + 4"),
            "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>",
            ["\n", "3", " ", "+", " ", "4", "\n", "</think>", "7", "<|im_end|>", "\n"],
        ),
    ],
    ids=["direct", "thinking"],
)
def test_the_completion_carries_loss_from_the_choice_of_the_mode_to_the_end_of_the_turn(
    small_model: Path, tmp_path: Path, row: Row, shown: str, learned: list[str]
) -> None:
    _, processor = prepare_model(str(small_model), bf16=False)
    batch = collated(processor, [one_row(tmp_path / "rows.parquet", row)])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    num_shown = labels.index(next(label for label in labels if label != -100))
    assert labels == [-100] * num_shown + ids[num_shown:]
    decode = processor.tokenizer.decode
    assert decode(ids[:num_shown]) == shown
    assert [decode([token]) for token in ids[num_shown:]] == learned


@pytest.fixture(scope="module", params=["ours", "qwen2.5-vl"])
def processor(request: pytest.FixtureRequest, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns our processor, or one whose tokenizer, like Qwen2.5-VL's, normalises (NFC) and gets its think tokens new.

    Both split text by Qwen2's rules (`training.scratch.QWEN2_PRETOKENS`), which Qwen2.5 and Qwen3 share.
    """
    if request.param == "ours":
        return prepare_model(str(small_model), bf16=False)[1]
    folder = tmp_path_factory.mktemp("qwen") / "model"
    AutoModelForImageTextToText.from_pretrained(small_model).save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(small_model)
    state = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if "think" not in token["content"]]
    processor.tokenizer._tokenizer = type(processor.tokenizer.backend_tokenizer).from_str(json.dumps(state))
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    processor.save_pretrained(folder)
    assert len(AutoProcessor.from_pretrained(folder).tokenizer.encode("<think>")) > 1
    return prepare_model(str(folder), bf16=False)[1]


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "<" not in text
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXTS, answer=TEXTS, thought=TEXTS)
@pytest.mark.parametrize("mode", list(ThinkingMode))
def test_a_row_is_trained_on_with_the_tokens_that_its_mode_is_served_with(
    processor: Any, mode: ThinkingMode, question: str, answer: str, thought: str
) -> None:
    row = Row(question, answer, "" if mode is ThinkingMode.SHORT else thought)
    record = row.record()
    (ids,) = collated(processor, [{**record, "images": []}])["input_ids"].tolist()
    turn = processor.apply_chat_template(
        record["prompt"], tokenize=False, add_generation_prompt=True, thinking_mode="bare"
    )
    served = processor.apply_chat_template(
        record["prompt"], tokenize=False, add_generation_prompt=True, thinking_mode=str(mode)
    )
    assert served == turn + FORCED_PREFIX[mode]
    rest = render_completion(row.answer, row.thought).removeprefix(FORCED_PREFIX[mode]) + "<|im_end|>\n"
    encode = processor.tokenizer.encode
    assert ids == encode(served) + encode(rest) == encode(turn) + encode(FORCED_PREFIX[mode]) + encode(rest)


GOLDEN_LOSS = 5.956292
"""Loss of the step below when it was first taken."""


def test_one_step_on_fixed_weights_has_the_loss_it_always_had(small_model: Path, tmp_path: Path) -> None:
    model, processor = prepare_model(str(small_model), bf16=False)
    for number, parameter in enumerate(model.parameters()):
        values = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) + number).float()
        parameter.data = (1 + 0.1 * values if parameter.dim() == 1 else 0.4 * values).reshape(parameter.shape)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [Row(images=(png(56, 56, 9),)), Row(thought="3 + 4 = 7."), Row(answer="red", images=(png(28, 84, 200),))]
    path = write_corpus(tmp_path / "rows.parquet", rows)
    one_step = config(tmp_path / "model", path, tmp_path / "run", max_steps=1, batch_size=3, row_order="sequential")
    batch = collated(processor, list(load_rows([str(path)])))
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        log_probs = model(**batch).logits[:, :-1].log_softmax(dim=-1)
    learned = labels != -100
    by_hand = -log_probs[learned].gather(1, labels[learned][:, None]).mean().item()
    assert anneal(one_step)["loss"] == pytest.approx(by_hand, abs=1e-5)
    assert by_hand == pytest.approx(GOLDEN_LOSS, abs=1e-5)


# Rows with and without images, and rows that cannot be trained on.


def test_rows_without_images_stand_in_one_batch_with_others_and_alone(small_model: Path, tmp_path: Path) -> None:
    seen, text = Row(images=(png(56, 56),)), Row(thought="3 + 4 = 7.")
    two = Row(question="Which?", images=(png(28, 28), png(56, 84)))
    model, processor = prepare_model(str(small_model), bf16=False)
    rows = list(load_rows([str(write_corpus(tmp_path / "rows.parquet", [seen, text, two]))]))
    together = model(**collated(processor, [dict(row) for row in rows])).logits
    for number, row in enumerate(rows):
        alone = model(**collated(processor, [row])).logits[0]
        torch.testing.assert_close(together[number, : len(alone)], alone, rtol=1e-4, atol=1e-5)
    path = write_corpus(tmp_path / "mixed.parquet", [seen, text, two, text, text, text])
    result = anneal(config(small_model, path, tmp_path / "run", batch_size=3, max_steps=2, row_order="sequential"))
    assert math.isfinite(result["loss"])


def test_rows_that_are_too_long_are_skipped_whole_and_counted(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits, long = Row(images=(png(84, 56),)), Row(thought="one more and " * 40)
    big = Row(images=(png(112, 112),) * 3)  # 48 tokens of images alone
    path = write_corpus(tmp_path / "rows.parquet", [fits, long, big, fits])
    result = anneal(config(small_model, path, tmp_path / "run", max_length=44, max_steps=2))
    assert result["num_skipped"]["too_long"] == 2
    assert (result["num_rows"], result["num_thinking"]) == (2, 0)
    assert "2 rows to train on, skipped {'too_long': 2," in capsys.readouterr().err


def test_a_row_longer_than_the_context_of_the_model_is_skipped(small_model: Path, tmp_path: Path) -> None:
    context = AutoConfig.from_pretrained(small_model).get_text_config().max_position_embeddings
    path = write_corpus(tmp_path / "rows.parquet", [Row(), Row(thought="7 " * context)])
    assert anneal(config(small_model, path, tmp_path / "run", max_steps=1))["num_skipped"]["too_long"] == 1


def test_a_corpus_without_a_row_left_is_a_clear_error(small_model: Path, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "rows.parquet", [Row(), Row(images=(png(112, 112),))])
    with pytest.raises(TrainingError, match=r"no row .* of 2 rows, skipped \{'too_long': 2,"):
        anneal(config(small_model, path, tmp_path / "run", max_length=8))


@pytest.mark.parametrize("strategy", ["reasoning_only", "two_stage"])
def test_a_corpus_without_the_rows_of_its_strategy_is_a_clear_error(
    small_model: Path, tmp_path: Path, strategy: str
) -> None:
    path = write_corpus(tmp_path / "rows.parquet", [Row(), Row(thought="too long " * 20)])
    with pytest.raises(TrainingError, match=f"{strategy} has a stage without rows: .* 0 usable rows with reasoning"):
        anneal(config(small_model, path, tmp_path / "run", strategy=strategy, max_length=60))


# Strategies.


@pytest.fixture(scope="module")
def both_modes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a corpus of 10 thinking and 20 direct rows."""
    thinking = [Row(thought=f"red is {n}." * (1 + n % 4), images=(png(56, 56, n),)) for n in range(10)]
    direct = [Row(answer=str(n), images=(png(56, 28, n),)) for n in range(20)]
    rows = [row for n in range(10) for row in (thinking[n], direct[2 * n], direct[2 * n + 1])]
    return write_corpus(tmp_path_factory.mktemp("modes") / "rows.parquet", rows)


def completions_in_order(run: AnnealingConfig, tmp_path: Path) -> list[str]:
    """Returns the completions that a run trains on, in its order where that is not left to the trainer."""
    _, processor = prepare_model(run.model, bf16=False)
    corpus = load_rows(run.corpus)
    measures = measure_rows(corpus, processor, tmp_path, strip_thoughts=run.strategy is Strategy.DIRECT_ONLY)
    rows = training_rows(corpus, measures, run, max_length=2048, batch_rows=run.batch_size)
    order = range(len(rows.dataset)) if rows.sampler is None else rows.sampler
    texts = [row["completion"][0]["content"][0]["text"] for row in rows.dataset]
    return [texts[position] for position in order]


def test_each_strategy_trains_on_its_rows(small_model: Path, both_modes: Path, tmp_path: Path) -> None:
    def thinks(**chosen: Any) -> list[bool]:
        run = config(small_model, both_modes, tmp_path / "run", **{"max_steps": -1, **chosen})
        return ["red" in text for text in completions_in_order(run, tmp_path)]

    assert sum(thinks()) == 10 and len(thinks()) == 30
    assert thinks(strategy="reasoning_only") == [True] * 10
    assert thinks(strategy="direct_only") == [False] * 30
    assert thinks(strategy="two_stage") == [False] * 20 + [True] * 12  # 2.5 batches of four are three
    assert sum(thinks(reasoning_share=0.5)) == 10 and len(thinks(reasoning_share=0.5)) == 20
    assert sum(thinks(reasoning_share=0.2)) == 5 and len(thinks(reasoning_share=0.2)) == 25
    assert thinks(strategy="two_stage", reasoning_share=0.2, max_steps=5) == [False] * 16 + [True] * 4


def test_rows_without_their_thoughts_learn_the_empty_block_and_the_same_answer(
    small_model: Path, both_modes: Path
) -> None:
    _, processor = prepare_model(str(small_model), bf16=False)
    rows = without_thoughts(load_rows([str(both_modes)]))
    labels = collated(processor, [rows[n] for n in range(30)])["labels"]
    learned = [processor.tokenizer.decode(row[row != -100]) for row in labels]
    answers = [["7", str(2 * n), str(2 * n + 1)] for n in range(10)]
    assert learned == [f"\n\n</think>{answer}<|im_end|>\n" for three in answers for answer in three]


@pytest.mark.parametrize(
    "settings", [{"strategy": "direct_only"}, {"strategy": "reasoning_only"}, {"reasoning_share": 0.4}]
)
def test_a_strategy_trains_to_its_end_and_says_what_it_trained_on(
    small_model: Path, both_modes: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    result = anneal(config(small_model, both_modes, tmp_path / "run", max_steps=-1, **settings))
    expected = {"direct_only": (30, 0, 8), "reasoning_only": (10, 10, 3), "mixed": (25, 10, 7)}
    found = result["num_rows"], result["num_thinking"], result["steps"]
    assert found == expected[result["config"]["strategy"]]


@pytest.mark.parametrize("dies_at", [2, 5])
@pytest.mark.parametrize("row_order", ["random", "sequential", "grouped"])
def test_two_stages_that_died_in_either_end_with_the_weights_of_a_run_that_did_not(
    small_model: Path, both_modes: Path, tmp_path: Path, dies_at: int, row_order: str
) -> None:
    shared = {"strategy": "two_stage", "max_steps": 6, "save_steps": 1, "row_order": row_order}
    whole, died = (config(small_model, both_modes, tmp_path / name, **shared) for name in ("whole", "died"))
    result = anneal(whole)
    assert result["stage_steps"] == [4, 2]
    anneal_until(dies_at, died)
    assert anneal(died)["stage_steps"] == [4, 2]
    torch.testing.assert_close(weights(died), weights(whole), rtol=0, atol=1e-6)


def test_a_grouped_run_that_died_in_its_second_pass_ends_with_the_weights_of_one_that_did_not(
    small_model: Path, both_modes: Path, tmp_path: Path
) -> None:
    shared = {"row_order": "grouped", "max_steps": -1, "num_epochs": 2, "save_steps": 10}
    whole, died = (config(small_model, both_modes, tmp_path / name, **shared) for name in ("whole", "died"))
    assert anneal(whole)["steps"] == 15
    anneal_until(12, died)
    anneal(died)
    torch.testing.assert_close(weights(died), weights(whole), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "direct_only", "reasoning_share": 0.5}, "no meaning for the strategy direct_only"),
        ({"lora": LoraSettings(), "vision_learning_rate": 1e-5}, "leave out the rates"),
        ({"learning_rate": 0}, "nothing would be trained"),
        ({"learning_rate": 0, "vision_learning_rate": 0, "projector_learning_rate": 0}, "nothing would be trained"),
        ({"strategy": "mixt"}, "strategy"),
        ({"reasoning_share": 1.5}, "reasoning_share"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config(tmp_path, tmp_path, tmp_path, **settings)


# Learning rates.


def rates_by_part(folder: Path) -> list[float]:
    """Returns the rates in a checkpoint's optimiser: of each part in turn, with and without weight decay."""
    return [group["lr"] for group in torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]]


def test_each_part_has_its_own_rate_and_all_fall_to_one_floor(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    paper = {"learning_rate": 4e-5, "projector_learning_rate": 2e-5, "vision_learning_rate": 4e-6}
    anneal(config(small_model, corpus, tmp_path / "run", max_steps=4, save_steps=2, **paper))
    half, end = (rates_by_part(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4))
    assert half == pytest.approx([2.2e-5, 2.2e-5, 1.2e-5, 1.2e-5, 4e-6, 4e-6])
    assert end == pytest.approx([4e-6] * 6)


def test_a_constant_schedule_keeps_the_rate_of_each_part(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    rates = {"learning_rate": 1e-3, "projector_learning_rate": 1e-4, "vision_learning_rate": 1e-5}
    anneal(config(small_model, corpus, tmp_path / "run", schedule="constant", warmup_steps=2, **rates))
    assert rates_by_part(tmp_path / "run" / "checkpoint-6") == [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]


def test_rates_that_are_equal_train_as_one_rate_does(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    one = config(small_model, corpus, tmp_path / "one", warmup_steps=2, weight_decay=0.1)
    three = one.model_copy(update={"output": str(tmp_path / "three"), "vision_learning_rate": one.learning_rate})
    for run in (one, three):
        anneal(run)
    torch.testing.assert_close(weights(three), weights(one), rtol=0, atol=1e-7)


@pytest.mark.parametrize("frozen", list(Part))
def test_a_part_with_a_rate_of_zero_stays_as_it_was(
    small_model: Path, corpus: Path, tmp_path: Path, frozen: Part
) -> None:
    names = dict(zip(Part, ("learning_rate", "projector_learning_rate", "vision_learning_rate"), strict=True))
    rates = {name: 0.0 if part is frozen else 1e-3 for part, name in names.items()}
    anneal(config(small_model, corpus, tmp_path / "run", **rates))
    before, after = (
        dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters())
        for folder in (small_model, tmp_path / "run" / "model")
    )
    unchanged = {name for name, p in before.items() if torch.equal(p, after[name])}
    parts = parts_of(AutoModelForImageTextToText.from_pretrained(small_model))
    assert unchanged == {name for name, part in parts.items() if part is frozen}


# Memory and speed.


def test_accumulated_steps_weigh_every_token_as_one_large_step_does(
    small_model: Path, both_modes: Path, tmp_path: Path
) -> None:
    shared = {"row_order": "sequential", "max_steps": 4}
    large = config(small_model, both_modes, tmp_path / "large", **shared)
    small = config(small_model, both_modes, tmp_path / "small", **shared, batch_size=1, gradient_accumulation=4)
    assert anneal(small)["loss"] == pytest.approx(anneal(large)["loss"], abs=1e-5)
    torch.testing.assert_close(weights(small), weights(large), rtol=0, atol=2e-5)


def test_two_devices_train_as_one_with_twice_the_rows_does(small_model: Path, both_modes: Path, tmp_path: Path) -> None:
    shared = {"strategy": "two_stage", "row_order": "grouped", "max_steps": 4}
    one = config(small_model, both_modes, tmp_path / "one", **shared)
    two = config(small_model, both_modes, tmp_path / "two", **shared, batch_size=2)
    anneal(one)
    (tmp_path / "two.yaml").write_text(two.model_dump_json(), encoding="utf-8")  # JSON is YAML
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "training.annealing", "--config", str(tmp_path / "two.yaml")]
    site = str(root / "teacher" / "cpu_site")
    ran = subprocess.run(
        [*launch, *program],
        cwd=root,
        env={**os.environ, "PYTHONPATH": site, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    result = RunFolder(two.output).result()
    assert result is not None and result["stage_steps"] == [3, 1]
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=2e-5)


def test_computing_activations_again_changes_nothing(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    kept, again = (
        config(small_model, corpus, tmp_path / str(flag), gradient_checkpointing=flag) for flag in (False, True)
    )
    for run in (kept, again):
        anneal(run)
    torch.testing.assert_close(weights(again), weights(kept), rtol=0, atol=1e-6)


def test_rows_read_by_other_processes_are_the_same_rows(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    alone, helped = (config(small_model, corpus, tmp_path / str(n), loader_processes=n) for n in (0, 1))
    for run in (alone, helped):
        anneal(run)
    torch.testing.assert_close(weights(helped), weights(alone), rtol=0, atol=0)


def test_bfloat16_computes_with_float32_weights_and_saves_half_the_bytes(
    small_model: Path, corpus: Path, tmp_path: Path
) -> None:
    exact, short = (config(small_model, corpus, tmp_path / str(flag), bf16=flag) for flag in (False, True))
    losses = [anneal(run)["loss"] for run in (exact, short)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and losses[1] != losses[0]
    assert {tensor.dtype for tensor in weights(tmp_path / "True" / "checkpoint-6").values()} == {torch.float32}
    assert {tensor.dtype for tensor in weights(short).values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "True" / "model").dtype == torch.bfloat16


# Failures that leave a state to go on from.


def test_no_checkpoint_holds_weights_that_are_not_finite(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    often = {"save_steps": 1, "log_steps": 20, "max_steps": 20}
    diverging = config(small_model, corpus, tmp_path / "run", learning_rate=1e18, **often)
    with pytest.raises(TrainingError, match=r"no longer finite at step \d+; the newest checkpoint is whole"):
        anneal(diverging)
    newest = RunFolder(diverging.output).newest_checkpoint()
    assert newest is not None
    assert all(torch.isfinite(tensor).all() for tensor in weights(Path(newest)).values())


DIES_OF_A_FULL_DISK = """
    import resource, runpy, sys
    keep = runpy.run_path({site!r}, run_name="sitecustomize")
    from training import programs
    from training.annealing import AnnealingConfig, anneal
    from schemas.errors import StorageError

    log = programs.MetricsFile.on_log

    def fills_the_disk_at_step_five(self, args, state, control, **rest):
        log(self, args, state, control, **rest)
        if state.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, ({num_bytes}, resource.RLIM_INFINITY))

    programs.MetricsFile.on_log = fills_the_disk_at_step_five
    try:
        anneal(AnnealingConfig.model_validate_json({config!r}))
    except StorageError as error:
        print(error)
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("fails_in", "at"), [("model.safetensors", 0.5), ("optimizer.pt", 0.8), ("optimizer.pt", 0.9999)]
)
def test_a_checkpoint_that_does_not_fit_on_the_disk_is_a_clear_error_and_the_one_before_goes_on(
    small_model: Path, corpus: Path, tmp_path: Path, fails_in: str, at: float
) -> None:
    whole, full = (config(small_model, corpus, tmp_path / name) for name in ("whole", "full"))
    anneal(whole)
    # The system refuses to let a file grow beyond this, as it refuses any byte on a full disk.
    num_bytes = int(at * (tmp_path / "whole" / "checkpoint-3" / fails_in).stat().st_size)
    root = Path(__file__).parents[2]
    site = str(root / "teacher" / "cpu_site" / "sitecustomize.py")
    program = DIES_OF_A_FULL_DISK.format(site=site, num_bytes=num_bytes, config=full.model_dump_json())
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=root, capture_output=True, text=True, check=False
    )
    assert ran.returncode == StorageError.exit_code, ran.stderr
    assert f"cannot write a checkpoint in {tmp_path / 'full'}: " in ran.stdout
    assert RunFolder(full.output).newest_checkpoint() == str(tmp_path / "full" / "checkpoint-3")
    assert anneal(full)["steps"] == 6
    torch.testing.assert_close(weights(full), weights(whole), rtol=0, atol=1e-6)


def test_a_folder_that_holds_a_run_with_other_settings_is_refused(
    small_model: Path, corpus: Path, tmp_path: Path
) -> None:
    anneal(config(small_model, corpus, tmp_path / "run", max_steps=1))
    assert anneal(config(small_model, corpus, tmp_path / "run", max_steps=1, log_steps=5))["steps"] == 1
    with pytest.raises(ConfigError, match=r"learning_rate 0.001 -> 0.002"):
        anneal(config(small_model, corpus, tmp_path / "run", max_steps=1, learning_rate=2e-3))

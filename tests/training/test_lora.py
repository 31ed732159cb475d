from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from schemas.errors import TrainingError
from schemas.template import CHAT_TEMPLATE, THINK_TOKENS
from tests.training.corpora import Row, png, write_corpus
from training.annealing import AnnealingConfig, LoraTrainer, anneal
from training.checkpoints import prepare_model
from training.lora import LoraSettings, lora_config
from training.programs import MetricsFile

pytestmark = pytest.mark.filterwarnings("default")

QUESTIONS = [Row(images=(png(56, 56, shade),), answer=str(shade % 10)) for shade in range(8)]
THOUGHTS = [Row(images=(png(56, 84, shade),), answer="1", thought=f"red is {shade}.") for shade in range(8)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "rows.parquet", [*QUESTIONS, *THOUGHTS])


@pytest.fixture(scope="module")
def untied_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint whose output layer has weights of its own, as Qwen2.5-VL-7B's."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(small_model, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    model.save_pretrained(folder)
    return folder


def config(model: Path, corpus: Path, output: Path, **settings: Any) -> AnnealingConfig:
    fixed = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_steps": 1, "save_steps": 3}
    lora = LoraSettings(rank=4, dropout=0.1)
    return AnnealingConfig(
        model=str(model), corpus=[str(corpus)], output=str(output), lora=lora, **{**fixed, **settings}
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_adapter_stands_beside_the_language_model_and_the_think_tokens_are_trained(
    small_model: Path, untied_model: Path, tied: bool
) -> None:
    model, processor = prepare_model(str(small_model if tied else untied_model), bf16=False)
    found = lora_config(LoraSettings(), model, processor)
    layer = "model.language_model.layers.0."
    attention = [f"{layer}self_attn.{name}_proj" for name in "qkvo"]
    assert set(found.target_modules) == {*attention, *(f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down"))}
    ids = processor.tokenizer.convert_tokens_to_ids(list(THINK_TOKENS))
    embeddings = {"model.language_model.embed_tokens": ids}
    assert found.trainable_token_indices == (embeddings if tied else {**embeddings, "lm_head": ids})


def test_a_module_that_is_not_there_is_refused(small_model: Path) -> None:
    model, processor = prepare_model(str(small_model), bf16=False)
    assert lora_config(LoraSettings(target_modules=["q_proj"]), model, processor).target_modules == {"q_proj"}
    with pytest.raises(TrainingError, match=r"no modules named \['w_proj'\]"):
        lora_config(LoraSettings(target_modules=["q_proj", "w_proj"]), model, processor)


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_model_is_a_whole_checkpoint_that_says_what_the_adapted_one_said(
    small_model: Path, untied_model: Path, corpus: Path, tmp_path: Path, tied: bool
) -> None:
    start = small_model if tied else untied_model
    adapted: dict[str, torch.Tensor] = {}
    save = LoraTrainer.save_model

    def compares_before_it_merges(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            batch = next(iter(self.get_train_dataloader()))
            with torch.no_grad():
                adapted.update(**batch, logits=self.model.eval()(**batch).logits)
        save(self, output_dir, _internal_call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraTrainer, "save_model", compares_before_it_merges)
        anneal(config(start, corpus, tmp_path / "run"))
    folder = tmp_path / "run" / "model"
    expected = adapted.pop("logits")
    merged, before = (AutoModelForImageTextToText.from_pretrained(path) for path in (folder, start))
    torch.testing.assert_close(merged(**adapted).logits, expected, rtol=1e-4, atol=1e-4)
    assert (before(**adapted).logits - expected).abs().max() > 0.01
    assert set(load_file(folder / "model.safetensors")) == set(load_file(start / "model.safetensors"))
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.chat_template == processor.tokenizer.chat_template == CHAT_TEMPLATE
    ids = processor.tokenizer.convert_tokens_to_ids(list(THINK_TOKENS))
    for of_token in ("get_input_embeddings", "get_output_embeddings"):
        change = (getattr(merged, of_token)().weight - getattr(before, of_token)().weight).abs().sum(dim=1)
        assert (change > 0).nonzero().flatten().tolist() == sorted(ids)


def test_a_run_with_lora_that_died_ends_with_the_weights_of_one_that_did_not(
    small_model: Path, corpus: Path, tmp_path: Path
) -> None:
    whole, resumed = (config(small_model, corpus, tmp_path / name) for name in ("whole", "died"))
    anneal(whole)
    log = MetricsFile.on_log

    def dies_at_step_five(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        log(self, args, state, control, **rest)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "on_log", dies_at_step_five)
        with pytest.raises(KeyboardInterrupt):
            anneal(resumed)
    assert not (tmp_path / "died" / "checkpoint-3" / "model.safetensors").exists()
    assert anneal(resumed)["steps"] == 6
    expected, found = (load_file(Path(run.output, "model", "model.safetensors")) for run in (whole, resumed))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_adapter_of_a_bfloat16_model_is_trained_in_float32(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    anneal(config(small_model, corpus, tmp_path / "run", bf16=True))
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}

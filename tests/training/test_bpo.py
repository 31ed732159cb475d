from __future__ import annotations

import inspect
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import trl
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor
from trl import GRPOTrainer

from sampleworld.world import GLANCE, STEPS, draw_scene, render_scene
from schemas.errors import Interrupted, TrainingError
from schemas.rows import CORPUS_SCHEMA
from schemas.template import (
    BARE_TURN,
    CHAT_TEMPLATE,
    FORCED_PREFIX,
    ThinkingMode,
    parse_completion,
    render_completion,
)
from training import programs
from training.annealing import AnnealingConfig, anneal
from training.bpo import BpoConfig, BpoTrainer, bpo, build_trainer, check_images, grpo_arguments
from training.checkpoints import load_policy
from training.programs import RunFolder
from training.questions import load_questions
from training.rewards import RuleReward
from training.rollouts import BimodeRollout, forced_prefix
from training.rows import load_rows

pytestmark = pytest.mark.filterwarnings("default")

EPSILON_OF_TRL = 1e-4
"""TRL adds it to the standard deviation."""


def corpus_row(number: int, **changes: Any) -> dict[str, Any]:
    """Returns a corpus row about a scene; `with_image=False` makes a text-only one."""
    import random

    rng = random.Random(number)
    scene = draw_scene(rng)
    task = {**GLANCE, **STEPS}[["digit", "dot", "sum"][number % 3]](scene, rng)
    with_image = changes.pop("with_image", True)
    parts = [{"type": "image", "text": None}] * with_image + [{"type": "text", "text": task.question}]
    row = {
        "id": f"{number:032x}",
        "mode": "direct",
        "prompt": [{"role": "user", "content": parts}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "<think>\n\n</think>7"}]}],
        "images": [{"bytes": render_scene(scene), "path": None}] * with_image,
        "question": task.question,
        "choices": list(task.choices),
        "answer": task.answer,
        "reference": task.answer,
        "topic": str(task.topic),
        "kind": str(task.kind),
        "answer_type": str(task.answer_type),
        "source": "world",
        "origin": f"world:{number}",
    }
    return {**row, **changes}


def write_corpus(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=CORPUS_SCHEMA), path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [corpus_row(number, with_image=number != 5) for number in range(12)]
    return write_corpus(tmp_path_factory.mktemp("corpus") / "rows.parquet", rows)


@pytest.fixture(scope="module")
def answering_model(small_model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint that has learned to end its thoughts and answers, both modes mixed."""
    folder = tmp_path_factory.mktemp("annealed")
    rows = pq.read_table(corpus).to_pylist()
    for number, row in enumerate(rows):
        thought = "\nI see.\n" if number % 2 else "\n\n"
        row["completion"][0]["content"][0]["text"] = f"<think>{thought}</think>{number % 10}"
    path = write_corpus(folder / "rows.parquet", rows)
    anneal(
        AnnealingConfig(
            model=str(small_model),
            corpus=[str(path)],
            output=str(folder / "run"),
            max_steps=60,
            batch_size=12,
            learning_rate=1e-2,
            schedule="constant",
            log_steps=50,
        )
    )
    return folder / "run" / "model"


@pytest.fixture(autouse=True)
def _rollout_func_is_known_to_be_experimental(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def config(model: Path, corpus: Path, output: Path, **settings: Any) -> BpoConfig:
    fixed = {
        "half_group": 2,
        "prompts_per_step": 2,
        "batch_size": 4,
        "max_new_tokens": 6,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "save_steps": 2,
    }
    return BpoConfig(model=str(model), corpus=[str(corpus)], output=str(output), **{**fixed, **settings})


class ScriptedReward(RuleReward):
    """Gives these rewards in order, over and over, whatever the completions say."""

    def __init__(self, rewards: list[float | None]) -> None:
        self.rewards = rewards

    def __call__(self, *, completions: Any, **_: Any) -> list[float | None]:
        return [self.rewards[i % len(self.rewards)] for i in range(len(completions))]


def make_trainer(settings: BpoConfig, reward: RuleReward) -> BpoTrainer:
    model, processor = load_policy(settings.model)
    rows = load_questions(settings.corpus, processor, Path(settings.output), max_prompt_tokens=8192).rows
    return build_trainer(settings, grpo_arguments(settings, 1), model, processor, rows, reward)


def rolled_out(trainer: BpoTrainer, rows: list[int], copies: int) -> dict[str, Any]:
    """Returns the scored batch of these rows, each `copies` times."""
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[i] for i in rows for _ in range(copies)])


@pytest.fixture
def trainer(small_model: Path, corpus: Path, tmp_path: Path) -> BpoTrainer:
    made = make_trainer(config(small_model, corpus, tmp_path), ScriptedReward([1.0, 0.0, 0.0, 0.0]))
    made.mask_truncated_completions = False  # an untrained model ends nothing
    return made


def test_every_prompt_gets_g_completions_of_each_mode_with_the_masks_of_their_prefixes(trainer: BpoTrainer) -> None:
    batch = rolled_out(trainer, [0, 1], copies=4)
    tokenizer = trainer.processing_class.tokenizer
    for row in range(8):
        is_thinking = row % 4 < 2
        prefix = FORCED_PREFIX[ThinkingMode.LONG if is_thinking else ThinkingMode.SHORT]
        assert tokenizer.decode(batch["completion_ids"][row]).startswith(prefix)
        expected = [0, 1] if is_thinking else [0, 1, 0]
        generated = batch["tool_mask"].shape[1] - len(expected)
        assert batch["tool_mask"][row].tolist() == [*expected, *[1] * generated]


def test_advantages_are_normalised_over_the_merged_group(trainer: BpoTrainer) -> None:
    # Rewards 1 0 | 0 0: mean 1/4, unbiased deviation sqrt((0.75^2 + 3 * 0.25^2) / 3) = 1/2.
    batch = rolled_out(trainer, [0, 1], copies=4)
    high, low = 0.75 / (0.5 + EPSILON_OF_TRL), -0.25 / (0.5 + EPSILON_OF_TRL)
    torch.testing.assert_close(batch["advantages"], torch.tensor([high, low, low, low] * 2))


def test_an_unscored_completion_is_left_out_of_its_groups_statistics(trainer: BpoTrainer) -> None:
    # Scored rewards 1, 0, 0: mean 1/3, deviation sqrt((4/9 + 2/9 * 1/2 * 2) / 2) = sqrt(1/3).
    trainer.reward_funcs[0].rewards = [1.0, None, 0.0, 0.0]
    batch = rolled_out(trainer, [0], copies=4)
    sigma = math.sqrt(1 / 3) + EPSILON_OF_TRL
    torch.testing.assert_close(batch["advantages"], torch.tensor([2 / 3, 0.0, -1 / 3, -1 / 3]) / sigma)


def test_a_group_without_a_scored_completion_has_no_advantage(trainer: BpoTrainer) -> None:
    trainer.reward_funcs[0].rewards = [None]
    assert rolled_out(trainer, [0], copies=4)["advantages"].tolist() == [0.0] * 4


def test_rollout_and_loss_see_the_same_prompt_tokens_and_images(trainer: BpoTrainer) -> None:
    batch = rolled_out(trainer, [0, 5], copies=4)  # row 5 has no image
    processor = trainer.processing_class
    for row in (0, 4):
        mask = batch["prompt_mask"][row].bool()
        example = trainer.train_dataset[5 if row else 0]
        text = processor.apply_chat_template(example["prompt"], add_generation_prompt=True, thinking_mode=BARE_TURN)
        expected = processor(text=[text], images=[example["images"]] if example["images"] else None)
        assert batch["prompt_ids"][row][mask].tolist() == list(expected["input_ids"][0])
        assert text.endswith("<|im_start|>assistant\n")
    assert batch["num_images"] == [1, 1, 1, 1, 0, 0, 0, 0]
    broken = {**batch, "prompt_ids": batch["prompt_ids"].roll(1, dims=1)}
    with pytest.raises(TrainingError, match="where images are"):
        check_images(broken, trainer.model.config, processor)


def test_padding_changes_no_probability(trainer: BpoTrainer) -> None:
    batch = rolled_out(trainer, [0, 5], copies=4)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")

    def log_probabilities(rows: slice) -> torch.Tensor:
        part = {name: batch[name] for name in names} if rows.start == 0 else {}
        if part:
            part["num_images"] = batch["num_images"][rows]
            part["mm_token_type_ids"] = batch["mm_token_type_ids"][rows]
        keep = batch["prompt_mask"][rows].any(dim=0)
        ids = torch.cat([batch["prompt_ids"][rows][:, keep], batch["completion_ids"][rows]], dim=1)
        mask = torch.cat([batch["prompt_mask"][rows][:, keep], batch["completion_mask"][rows]], dim=1)
        if part:
            types = part["mm_token_type_ids"]
            width = batch["prompt_mask"].shape[1]
            part["mm_token_type_ids"] = torch.cat([types[:, :width][:, keep], types[:, width:]], dim=1)
        with torch.no_grad():
            return GRPOTrainer._get_per_token_logps_and_entropies(
                trainer, trainer.model, ids, mask, batch["completion_ids"].shape[1], **part
            )[0]

    with torch.no_grad():
        together = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            **{name: batch[name] for name in names},
        )[0]
    apart = torch.cat([log_probabilities(slice(0, 4)), log_probabilities(slice(4, 8))])
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(together[mask], apart[mask], rtol=0, atol=2e-5)


class ChoiceModel(nn.Module):
    """A policy of one parameter: the logit of thinking. Every other token has a fixed probability."""

    def __init__(self, probability: float, newline_id: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(math.log(probability / (1 - probability))))
        self.newline_id = newline_id

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        choice = input_ids[:, 1 - 3]  # completions below have three tokens, their second is the choice
        log_probability = nn.functional.logsigmoid(torch.where(choice == self.newline_id, self.logit, -self.logit))
        log_probs = torch.zeros(input_ids.shape, dtype=torch.float32)
        log_probs = log_probs.index_put((torch.arange(len(choice)), torch.tensor([-2])), log_probability)
        return type("Output", (), {"log_probs": log_probs, "entropy": torch.zeros_like(log_probs)})()


def choice_gradient(
    trainer: BpoTrainer, probability: float, modes: str, rewards: list[float], *, has_loss: bool = True
) -> float:
    """Returns d loss / d logit(thinking) of one group, T thinking and N direct, when only the choice can learn."""
    newline, blank, other = 1, 2, 3
    trainer._newline_id = newline
    values = torch.tensor(rewards)
    advantages = (values - values.mean()) / (values.std() + EPSILON_OF_TRL)
    completions = torch.tensor([[other, newline if mode == "T" else blank, other] for mode in modes])
    model = ChoiceModel(probability, newline)
    batch = {
        "prompt_ids": torch.full((len(modes), 1), other),
        "prompt_mask": torch.ones(len(modes), 1, dtype=torch.long),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "tool_mask": torch.tensor([[0, int(has_loss), int(not has_loss)]] * len(modes)),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(len(modes)),
    }
    trainer.beta = 0.0
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    trainer.model.train()
    trainer._compute_loss(model, batch).backward()
    assert model.logit.grad is not None
    return float(model.logit.grad)


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("normalise_by", ["token", "sequence"])
def test_the_choice_learns_by_delta_over_four_sigma_however_improbable_it_is(
    trainer: BpoTrainer, probability: float, normalise_by: str
) -> None:
    trainer.loss_type = {"token": "dapo", "sequence": "grpo"}[normalise_by]
    rewards = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]  # thinking 3/4, direct 1/4
    sigma = torch.tensor(rewards).std().item() + EPSILON_OF_TRL
    assert choice_gradient(trainer, probability, "TTTTNNNN", rewards) == pytest.approx(-0.5 / (4 * sigma), rel=1e-5)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_where_both_modes_are_equally_right_the_choice_is_left_alone(trainer: BpoTrainer, probability: float) -> None:
    assert choice_gradient(trainer, probability, "TTNN", [1.0, 0.0, 0.0, 1.0]) == pytest.approx(0.0, abs=1e-7)


def test_a_masked_choice_gets_no_gradient(trainer: BpoTrainer) -> None:
    assert choice_gradient(trainer, 0.3, "TTNN", [1.0, 1.0, 0.0, 0.0], has_loss=False) == 0.0


def test_plain_grpo_loses_the_gradient_of_an_improbable_choice(trainer: BpoTrainer) -> None:
    # A group as the policy itself would draw it at p = 1/8: p (1 - p) delta / sigma.
    rewards = [1.0] + [0.0] * 7
    sigma = torch.tensor(rewards).std().item() + EPSILON_OF_TRL
    gradient = choice_gradient(trainer, 1 / 8, "TNNNNNNN", rewards)
    assert gradient == pytest.approx(-(1 / 8) * (7 / 8) / sigma, rel=1e-5)


def test_the_loss_of_one_step_on_fixed_weights_is_what_it_was(trainer: BpoTrainer) -> None:
    torch.manual_seed(1)
    batch = rolled_out(trainer, [0, 1], copies=4)
    completions = torch.arange(batch["completion_ids"].numel()).view(batch["completion_ids"].shape) % 200 + 20
    batch["completion_ids"][:, 3:] = completions[:, 3:]
    batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
    mask = batch["tool_mask"]
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    batch["num_items_in_batch"] = mask.sum()
    batch["ref_per_token_logps"] = torch.zeros_like(batch["ref_per_token_logps"]) - 5.0
    loss = trainer._compute_loss(trainer.model, batch).item()
    log_probs = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer,
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].shape[1],
        **{name: batch[name] for name in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")},
    )[0].detach()
    distance = -5.0 - log_probs
    per_token = -batch["advantages"][:, None] + trainer.beta * (distance.exp() - distance - 1)
    assert loss == pytest.approx(((per_token * mask).sum() / mask.sum()).item(), rel=1e-5)


def test_a_run_leaves_a_model_metrics_and_last_a_result(answering_model: Path, corpus: Path, tmp_path: Path) -> None:
    result = bpo(config(answering_model, corpus, tmp_path / "run", max_new_tokens=16))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    probabilities = [line["bpo/thinking_probability"] for line in steps if "bpo/thinking_probability" in line]
    assert probabilities and all(0 < probability < 1 for probability in probabilities)
    assert result["num_rows"] == 12
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert AutoProcessor.from_pretrained(tmp_path / "run" / "model").chat_template == CHAT_TEMPLATE
    assert bpo(config(answering_model, corpus, tmp_path / "run", max_new_tokens=16)) == result


@pytest.fixture
def stopped_at_step_two() -> Iterator[None]:
    log = programs.MetricsFile.on_log

    def signals(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        log(self, args, state, control, **rest)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.MetricsFile, "on_log", signals)
        yield


def test_a_run_stopped_by_a_signal_ends_with_the_weights_of_one_that_was_not(
    answering_model: Path, corpus: Path, tmp_path: Path, stopped_at_step_two: None
) -> None:
    resumed = config(answering_model, corpus, tmp_path / "stopped", save_steps=100)
    with pytest.raises(Interrupted):
        bpo(resumed)
    assert RunFolder(resumed.output).newest_checkpoint() is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        patch.setattr(os, "kill", lambda *_: None)
        bpo(resumed)
        whole = config(answering_model, corpus, tmp_path / "whole", save_steps=100)
        bpo(whole)
    expected, found = (load_file(Path(run.output, "model", "model.safetensors")) for run in (whole, resumed))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_run_cancelled_during_a_rollout_ends_its_step_and_writes_a_checkpoint(
    answering_model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = BimodeRollout.__call__
    monkeypatch.setattr(
        BimodeRollout, "__call__", lambda *given: (os.kill(os.getpid(), signal.SIGTERM), draw(*given))[1]
    )
    with pytest.raises(Interrupted):
        bpo(config(answering_model, corpus, tmp_path / "run", save_steps=100))
    assert RunFolder(tmp_path / "run").newest_checkpoint() == str(tmp_path / "run" / "checkpoint-1")


def test_a_run_whose_every_reply_is_unscored_changes_nothing_but_by_its_kl(
    small_model: Path, corpus: Path, tmp_path: Path
) -> None:
    # Untrained, the model never ends a thought within six tokens, nor an answer.
    bpo(config(small_model, corpus, tmp_path / "run", max_new_tokens=1, max_steps=2))
    before, after = (load_file(folder / "model.safetensors") for folder in (small_model, tmp_path / "run" / "model"))
    assert all(torch.isfinite(weights).all() for weights in after.values())
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all("NaN" not in line for line in lines)
    assert json.loads(lines[0])["bpo/unscored_long"] == 1.0


def test_rows_that_cannot_be_asked_are_counted_by_reason(small_model: Path, tmp_path: Path) -> None:
    rows = [
        corpus_row(0),
        corpus_row(1, kind="subjective", answer_type="open"),
        corpus_row(2, reference=None),
        corpus_row(3, topic="chart"),
    ]
    path = write_corpus(tmp_path / "rows.parquet", rows)
    processor = AutoProcessor.from_pretrained(small_model)
    questions = load_questions([str(path)], processor, tmp_path, topics=["ocr"], max_prompt_tokens=8192)
    assert len(questions.rows) == 1
    assert questions.num_skipped == {"not_objective": 1, "no_reference": 1, "other_topic": 1}
    sample = questions.rows[0]["sample"]
    assert (sample.question, sample.answer) == (rows[0]["question"], rows[0]["reference"])


def test_a_prompt_longer_than_allowed_is_skipped_and_counted_with_its_image(small_model: Path, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "rows.parquet", [corpus_row(0), corpus_row(5, with_image=False)])
    processor = AutoProcessor.from_pretrained(small_model)
    lengths = []
    for row in load_questions([str(path)], processor, tmp_path, max_prompt_tokens=8192).rows:
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        lengths.append(len(processor(text=[text], images=row["images"] or None)["input_ids"][0]))
    limit = max(lengths) - 1
    questions = load_questions([str(path)], processor, tmp_path, max_prompt_tokens=limit)
    assert len(questions.rows) == 1
    assert questions.num_skipped == {"too_long": 1}


def test_a_corpus_without_checkable_rows_is_a_clear_error(small_model: Path, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "rows.parquet", [corpus_row(0, kind="subjective")])
    with pytest.raises(TrainingError, match=r"checked by rule.*not_objective"):
        bpo(config(small_model, path, tmp_path / "run"))


def test_a_missing_checkpoint_is_a_clear_error(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint"):
        bpo(config(tmp_path / "none", corpus, tmp_path / "run"))


def test_a_loss_that_is_not_finite_ends_the_run(answering_model: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite|loss is"):
        bpo(config(answering_model, corpus, tmp_path / "run", learning_rate=1e30, max_grad_norm=1e30, max_steps=20))


def test_a_batch_that_does_not_divide_the_step_is_refused(small_model: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must divide"):
        config(small_model, corpus, tmp_path, batch_size=3)
    with pytest.raises(TrainingError, match="3 processes"):
        grpo_arguments(config(small_model, corpus, tmp_path), 3)


def test_in_auto_mode_the_model_chooses_and_its_choice_carries_loss(
    small_model: Path, corpus: Path, tmp_path: Path
) -> None:
    made = make_trainer(config(small_model, corpus, tmp_path, rollouts="auto"), ScriptedReward([1.0, 0.0]))
    made.mask_truncated_completions = False
    batch = rolled_out(made, [0], copies=4)
    assert batch["tool_mask"][:, :2].tolist() == [[0, 1]] * 4


def test_a_thought_is_read_from_the_completion_as_the_corpus_writes_it(trainer: BpoTrainer) -> None:
    completion = trainer.processing_class.tokenizer.encode("<think>\nI see 7.\n</think>7")
    parsed = parse_completion(trainer.processing_class.tokenizer.decode(completion, skip_special_tokens=True))
    assert (parsed.reasoning, parsed.answer) == ("I see 7.", "7")


def test_trl_is_the_version_whose_inner_methods_are_used() -> None:
    """What BPO uses of TRL beyond its public face. A new version must be looked at before it is pinned."""
    assert trl.__version__.startswith("1.16.")
    expected = {
        "_tokenize_prompts": ["self", "prompts"],
        "_generate_single_turn": [
            "self",
            "prompt_ids",
            "images",
            "multimodal_fields",
            "num_generations",
            "has_tool_images",
        ],
        "_generate_and_score_completions": ["self", "inputs"],
    }
    for name, arguments in expected.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == arguments
    scored = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert scored[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]


@pytest.mark.parametrize(("mode", "thought"), [(ThinkingMode.LONG, "I see 7."), (ThinkingMode.SHORT, "")])
def test_a_completion_has_the_same_tokens_in_bpo_as_in_annealing(
    trainer: BpoTrainer, corpus: Path, mode: ThinkingMode, thought: str
) -> None:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = trainer.processing_class
    text = render_completion("7", thought)
    row = load_rows([str(corpus)])[0]
    row["completion"][0]["content"][0]["text"] = text
    annealed = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([row])["input_ids"][0]
    batch = rolled_out(trainer, [0], copies=4)
    prompt = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist()
    prefix = forced_prefix(processor.tokenizer, mode).token_ids
    generated = processor.tokenizer.encode(text.removeprefix(FORCED_PREFIX[mode]))
    end = processor.tokenizer.eos_token_id
    assert [*prompt, *prefix, *generated, end] == annealed[annealed != processor.tokenizer.pad_token_id].tolist()[:-1]

"""Bi-mode Policy Optimization (R-4B, arXiv 2508.21113, section 3) on TRL's GRPOTrainer.

For each prompt, g completions are forced to think and g to answer at once. Their rewards are normalised over the merged
group of 2g, A = (r - mean) / std, and the objective is GRPO's: the mean over the group of
min(R A, clip(R, 1 - epsilon, 1 + epsilon) A) - beta KL(policy || annealed checkpoint), with the ratio R per token.

Why that heals thinking atrophy. Let p be the policy's probability of thinking, mu_T and mu_N the halves' mean rewards,
sigma the merged deviation, delta = mu_T - mu_N. The mean advantages of the halves are +-delta / (2 sigma). The choice
token of a thinking completion adds grad log p = (1 - p) grad logit(p), that of a direct one -p grad logit(p); half the
group each, so together (1/2) (delta / (2 sigma)) ((1 - p) + p) = delta / (4 sigma), whatever p is. Plain GRPO, whose
model chooses for itself, gets p (1 - p) delta / sigma, which vanishes with p. With delta = 0 nothing moves: questions
that both modes answer equally well keep what annealing gave them.

Unpublished, and chosen here: learning rate, batch, g, epsilon, beta, temperature, that the choice token carries loss,
and that the loss is normalised by tokens (with a mean per sequence a long thought drowns its own choice token).

Left out on purpose: a copy of the trainer. What is used of TRL beyond its public face is held by tests.
The file contract is that of `training.programs`. A run that was stopped ends with the weights of one that was not where
transformers generates and each rollout is used once; vLLM draws random numbers of its own, and with
`updates_per_rollout` above 1 a resumed run draws the rollouts it was using again.

    python -m training.bpo --config bpo.yaml
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from pydantic import Field, model_validator
from trl import GRPOConfig, GRPOTrainer

from schemas.config import VerificationConfig
from schemas.errors import TrainingError
from schemas.samples import Topic
from schemas.template import BARE_TURN
from training.checkpoints import TrueResume, accept_no_images, load_policy
from training.programs import ProgramConfig, Result, RunFolder, run_program, train_to_end
from training.questions import load_questions
from training.rewards import RuleReward
from training.rollouts import BimodeRollout


class BpoConfig(ProgramConfig):
    """Settings of one BPO run."""

    model: str = Field(description="Folder or hub name of the annealed checkpoint: where the policy starts from.")
    corpus: list[str] = Field(
        description="Parquet files or globs of a corpus; its checkable rows are asked.", min_length=1
    )
    topics: list[Topic] = Field(default_factory=list, description="Ask only these topics; the paper asks math alone.")
    max_prompt_tokens: int = Field(8192, ge=1, description="Longer prompts, images included, are skipped and counted.")
    rollouts: str = Field(
        "bimode",
        pattern="^(bimode|auto)$",
        description="`bimode` forces both modes for every prompt; `auto` is plain GRPO, the model chooses.",
    )
    half_group: int = Field(8, ge=1, description="g: completions of each mode for a prompt; a group has 2g.")
    prompts_per_step: int = Field(32, ge=1, description="Prompts of one optimiser step, over all devices.")
    batch_size: int = Field(8, ge=1, description="Completions per device whose loss is computed at once.")
    max_new_tokens: int = Field(8192, ge=1, description="Tokens generated after the forced prefix.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the rollouts.")
    epsilon: float = Field(0.2, gt=0, lt=1, description="Clipping of the ratio.")
    beta: float = Field(0.01, ge=0, description="Weight of the KL divergence to the annealed checkpoint.")
    updates_per_rollout: int = Field(1, ge=1, description="Optimiser steps on the same rollouts.")
    normalise_by: str = Field(
        "token",
        pattern="^(token|sequence)$",
        description="Mean of the loss over all tokens of the step, or over each completion's tokens first.",
    )
    choice_token_loss: bool = Field(True, description="Whether the forced choice of mode carries loss.")
    format_weight: float = Field(0.0, ge=0, description="Reward of a well-formed completion, added to accuracy.")
    verification: VerificationConfig = Field(default_factory=VerificationConfig)
    engine: str = Field(
        "transformers",
        pattern="^(transformers|vllm|vllm-server)$",
        description="What generates: transformers, vLLM in this process, or a server started with `trl vllm-serve`.",
    )
    vllm_url: str | None = Field(None, description="Address of the server when engine is vllm-server.")
    vllm_memory_share: float = Field(0.3, gt=0, lt=1, description="Share of a GPU's memory for vLLM in this process.")
    max_steps: int = Field(-1, description="Optimiser steps; -1 trains num_epochs.")
    num_epochs: float = Field(1.0, gt=0, description="Passes over the prompts when max_steps is -1.")
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    schedule: str = Field("constant", pattern="^(cosine|constant)$", description="Course of the learning rate.")
    max_grad_norm: float = Field(1.0, gt=0, description="Clipping of the gradient's norm.")
    bf16: bool = Field(False, description="Compute in bfloat16; trained weights stay in float32.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    log_steps: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    save_steps: int = Field(50, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="How many of the newest checkpoints are kept.")
    seed: int = Field(0, description="Seed of the order of the prompts and of sampling.")

    @model_validator(mode="after")
    def _batch_divides_the_step(self) -> BpoConfig:
        if self.num_completions % self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must divide the completions of a step, prompts_per_step x 2 half_group "
                f"= {self.num_completions}"
            )
        if (self.engine == "vllm-server") != (self.vllm_url is not None):
            raise ValueError("vllm_url is needed with engine: vllm-server, and only then")
        return self

    @property
    def num_completions(self) -> int:
        """Completions of one optimiser step, over all devices."""
        return 2 * self.half_group * self.prompts_per_step


class BpoTrainer(TrueResume, GRPOTrainer):
    """GRPOTrainer that resumes truly, logs the policy's probability of thinking, and checks what the loss is given."""

    def __init__(self, *, newline_id: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._newline_id = newline_id
        for model in (self.model, self.ref_model):
            if model is not None:
                accept_no_images(model)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        check_images(batch, self.model.config, self.processing_class)
        return batch

    def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **named: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(model, *arguments, **named)
        if torch.is_grad_enabled() and self.model.training:
            input_ids, mask, num_completion = arguments[:3]
            chosen, present = input_ids[:, -num_completion:][:, 1], mask[:, -num_completion:][:, 1] == 1
            probabilities = found[0][:, 1][present & (chosen == self._newline_id)].detach().exp()
            if probabilities.numel():
                self._metrics["train"]["bpo/thinking_probability"].append(probabilities.mean().item())
        return found


def check_images(batch: dict[str, Any], model_config: Any, processor: Any) -> None:
    """Raises TrainingError: the prompt tokens that were rolled out are not those whose images the loss is given."""
    image_id = getattr(model_config, "image_token_id", None)
    if image_id is None or "image_grid_thw" not in batch:
        return
    is_image = batch["prompt_ids"] == image_id
    patches = batch["image_grid_thw"].prod(dim=-1) // processor.image_processor.merge_size**2
    per_row = torch.stack([part.sum() for part in torch.split(patches, batch["num_images"])])
    same_counts = torch.equal(is_image.sum(dim=1), per_row.to(is_image.device))
    types = batch.get("mm_token_type_ids")
    if not same_counts or (types is not None and not torch.equal(types[:, : is_image.shape[1]] == 1, is_image)):
        raise TrainingError(
            "the prompts as rolled out and as given to the loss disagree on where images are: the processor renders "
            "the same conversation in two ways"
        )


def grpo_arguments(config: BpoConfig, num_processes: int) -> GRPOConfig:
    """Returns TRL's settings. num_processes: of this launch; a step's completions are shared out among them.

    Raises TrainingError: they cannot be shared out evenly.
    """
    per_round = config.batch_size * num_processes
    if config.num_completions % per_round:
        raise TrainingError(
            f"{config.num_completions} completions of a step do not divide among {num_processes} processes with "
            f"batch_size {config.batch_size}: change prompts_per_step or batch_size"
        )
    num_rounds = config.num_completions // per_round
    return GRPOConfig(
        output_dir=config.output,
        max_steps=config.max_steps,
        num_train_epochs=config.num_epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=num_rounds,
        steps_per_generation=num_rounds,
        num_iterations=config.updates_per_rollout,
        num_generations=2 * config.half_group,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        epsilon=config.epsilon,
        beta=config.beta,
        loss_type={"token": "dapo", "sequence": "grpo"}[config.normalise_by],
        scale_rewards="group",
        mask_truncated_completions=True,
        chat_template_kwargs={"thinking_mode": BARE_TURN},
        use_vllm=config.engine != "transformers",
        vllm_mode="server" if config.engine == "vllm-server" else "colocate",
        vllm_server_base_url=config.vllm_url,
        vllm_gpu_memory_utilization=config.vllm_memory_share,
        learning_rate=config.learning_rate,
        lr_scheduler_type={"cosine": "cosine", "constant": "constant_with_warmup"}[config.schedule],
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # else a loss that is not finite is logged as if it were
        save_steps=config.save_steps,
        save_total_limit=config.keep_checkpoints,
        seed=config.seed,
        data_seed=config.seed,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def build_trainer(
    config: BpoConfig, arguments: GRPOConfig, model: Any, processor: Any, rows: Any, reward: Any
) -> BpoTrainer:
    """Returns the trainer of a policy, as `load_policy` returns it. Raises TrainingError: its think tokens are none."""
    half = config.half_group if config.rollouts == "bimode" else None
    return BpoTrainer(
        newline_id=processor.tokenizer.encode("\n", add_special_tokens=False)[0],
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=rows,
        processing_class=processor,
        rollout_func=BimodeRollout(processor.tokenizer, half=half, choice_has_loss=config.choice_token_loss),
    )


class _UnscoredIsCounted(logging.Filter):
    """Drops TRL's warning on each reply without a reward, which quotes the whole row: `bpo/unscored_*` counts them."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "All reward functions returned None" not in record.getMessage()


def bpo(config: BpoConfig) -> Result:
    """Trains as configured and returns the content of result.json. Resumes from the newest whole checkpoint.

    Raises TrainingError: missing or unsuitable checkpoint, no checkable row, a loss that is not finite. StorageError:
    the disk fails. Interrupted: a signal asked to stop.
    """
    folder = RunFolder(config.output)
    if (finished := folder.begin(config)) is not None:
        return finished
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func: what is used of it is held by tests
    logging.getLogger("trl.trainer.grpo_trainer").addFilter(_UnscoredIsCounted())
    model, processor = load_policy(config.model)
    questions = load_questions(
        config.corpus, processor, folder.path, topics=config.topics, max_prompt_tokens=config.max_prompt_tokens
    )
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    with RuleReward(config.verification, format_weight=config.format_weight) as reward:
        trainer = build_trainer(config, grpo_arguments(config, num_processes), model, processor, questions.rows, reward)
        output = train_to_end(trainer, folder)
    return folder.finish(
        {
            "program": "bpo",
            "steps": output.global_step,
            "loss": output.training_loss,
            "seconds": output.metrics.get("train_runtime"),
            "num_rows": len(questions.rows),
            "num_skipped": questions.num_skipped,
            "model": "model",
            "config": config.model_dump(mode="json"),
        }
    )


def main() -> None:
    run_program(__doc__, BpoConfig, bpo)


if __name__ == "__main__":
    main()

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    get_scheduler,
)

from schemas.errors import TrainingError
from training.parts import Part, cosine_share, freeze, parameter_groups, parts_of

pytestmark = pytest.mark.filterwarnings("default")

TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXELS = {"image_size": 28, "patch_size": 14}


def qwen2_5_vl(small_model: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(small_model)


def qwen3_vl(_: Path) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    grid = {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**TEXT, **HEADS, "head_dim": 8, "rope_parameters": rope}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config={**vision, **grid}))


def llava(_: Path) -> Any:
    text, vision = LlamaConfig(**TEXT, **HEADS), CLIPVisionConfig(**VISION, **PIXELS)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))


def gemma3(_: Path) -> Any:
    config = Gemma3Config(text_config={**TEXT, **HEADS, "head_dim": 8}, vision_config={**VISION, **PIXELS})
    return Gemma3ForConditionalGeneration(config)


def blip2(_: Path) -> Any:
    former = {**VISION, "vocab_size": 8, "encoder_hidden_size": 16}
    text = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(vision_config={**VISION, **PIXELS}, qformer_config=former, text_config=text)
    return Blip2ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("build", "tower", "projectors"),
    [
        (qwen2_5_vl, "model.visual.", ["model.visual.merger."]),
        (qwen3_vl, "model.visual.", ["model.visual.merger.", "model.visual.deepstack_merger_list."]),
        (llava, "model.vision_tower.", ["model.multi_modal_projector."]),
        (gemma3, "model.vision_tower.", ["model.multi_modal_projector."]),
    ],
)
def test_every_parameter_of_a_vision_language_model_belongs_to_its_part(
    small_model: Path, build: Any, tower: str, projectors: list[str]
) -> None:
    model = build(small_model)
    for name, part in parts_of(model).items():
        if name.startswith(tuple(projectors)):
            assert part is Part.PROJECTOR, name
        elif name.startswith(tower):
            assert part is Part.VISION_TOWER, name
        else:
            assert part is Part.LANGUAGE_MODEL, name
            assert name.startswith(("model.language_model.", "lm_head."))
    assert set(parts_of(model)) == {name for name, _ in model.named_parameters()}


def test_a_model_with_a_part_of_another_kind_is_refused_with_its_parameters(small_model: Path) -> None:
    with pytest.raises(TrainingError, match=r"Blip2.* no part known for \['query_tokens', 'qformer\.") as raised:
        parts_of(blip2(small_model))
    assert "Leave projector_learning_rate and vision_learning_rate out" in str(raised.value)


def test_a_model_without_eyes_is_refused() -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**TEXT, **HEADS))
    with pytest.raises(TrainingError, match=r"no \['projector', 'vision_tower'\] among \['model.embed_tokens.weight'"):
        parts_of(model)


def test_the_optimiser_gets_each_part_with_its_rate_and_no_decay_where_none_belongs(small_model: Path) -> None:
    model = qwen2_5_vl(small_model)
    rates = {Part.LANGUAGE_MODEL: 4e-5, Part.PROJECTOR: 2e-5, Part.VISION_TOWER: 4e-6}
    decayed = {name for name, p in model.named_parameters() if p.dim() > 1}
    groups = parameter_groups(model, rates, decayed=decayed, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (4e-5, 0.1),
        (4e-5, 0.0),
        (2e-5, 0.1),
        (2e-5, 0.0),
        (4e-6, 0.1),
        (4e-6, 0.0),
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert any(p is model.model.visual.merger.mlp[0].weight for p in groups[2]["params"])
    assert all(p.dim() > 1 for group in groups[::2] for p in group["params"])


def test_a_rate_of_zero_freezes_its_part_and_no_other(small_model: Path) -> None:
    model = qwen2_5_vl(small_model)
    rates = {Part.LANGUAGE_MODEL: 0.0, Part.PROJECTOR: 1e-3, Part.VISION_TOWER: 0.0}
    freeze(model, rates)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, part in parts_of(model).items() if part is Part.PROJECTOR}
    groups = parameter_groups(model, rates, decayed=set(), weight_decay=0.1)
    assert [group["lr"] for group in groups] == [1e-3]


@given(st.integers(0, 5), st.integers(6, 40), st.floats(0, 1))
def test_the_course_of_a_rate_is_that_of_transformers(warmup_steps: int, num_steps: int, floor: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs={"min_lr_rate": floor},
    ).lr_lambdas[0]
    for step in range(num_steps + 1):
        ours = cosine_share(step, warmup_steps=warmup_steps, num_steps=num_steps, floor=floor)
        assert ours == pytest.approx(theirs(step), abs=1e-12)

"""The parts of a vision-language model, told apart, so that each has its own learning rate.

R-4B trains its language model with 4e-5 falling to 4e-6, and its vision tower and projector with 4e-6 (appendix, table
I). The language model and the vision tower are found through transformers' own accessors. The projector has none: it
lies beside the tower (LLaVA) or inside it (the mergers of the Qwen-VL family), and is found by what it is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from schemas.errors import TrainingError


class Part(StrEnum):
    """A part of a vision-language model. The projector brings what the vision tower sees to the language model."""

    LANGUAGE_MODEL = "language_model"
    PROJECTOR = "projector"
    VISION_TOWER = "vision_tower"


PROJECTOR_WORDS = ("projector", "merger", "connector", "aligner", "resampler")
"""What transformers' models call their projectors: some module on the way to each of its parameters has such a name."""


def parts_of(model: Any) -> dict[str, Part]:
    """Returns the part of each parameter of a model from transformers, by the parameter's name.

    Input and output embeddings belong to the language model.

    Raises TrainingError: a parameter belongs to no known part, or a part has no parameters; names them.
    """
    text = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    language = {id(p) for module in text if module is not None for p in module.parameters()}
    vision = {id(p) for p in model.get_encoder(modality="image").parameters()}
    found: dict[str, Part] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in language:
            found[name] = Part.LANGUAGE_MODEL
        elif any(word in name for word in PROJECTOR_WORDS):
            found[name] = Part.PROJECTOR
        elif id(parameter) in vision:
            found[name] = Part.VISION_TOWER
    unknown = [name for name, _ in model.named_parameters() if name not in found]
    empty = [str(part) for part in Part if part not in found.values()]
    if unknown or empty:
        reason = f"no part known for {_shortened(unknown)}" if unknown else f"no {empty} among {_shortened([*found])}"
        raise TrainingError(
            f"cannot tell the parts of {type(model).__name__} apart: {reason}. Leave projector_learning_rate and "
            "vision_learning_rate out to train everything with learning_rate"
        )
    return found


def freeze(model: Any, rates: Mapping[Part, float]) -> None:
    """Takes the parts whose learning rate is 0 out of training. Raises TrainingError: see `parts_of`."""
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        if rates[parts[name]] == 0:
            parameter.requires_grad_(False)


def parameter_groups(
    model: Any, rates: Mapping[Part, float], *, decayed: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Returns the optimiser's parameter groups: each part's parameters with and without weight decay.

    decayed: names of the parameters that weight decay applies to. Frozen parameters and empty groups are left out.
    """
    parts = parts_of(model)
    groups = []
    for part in Part:
        of_part = [(name, p) for name, p in model.named_parameters() if parts[name] is part and p.requires_grad]
        for decay, chosen in (
            (weight_decay, [p for name, p in of_part if name in decayed]),
            (0.0, [p for name, p in of_part if name not in decayed]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": rates[part], "weight_decay": decay})
    return groups


def cosine_share(step: int, *, warmup_steps: int, num_steps: int, floor: float) -> float:
    """Returns the learning rate after so many steps, as a share of its peak.

    It rises linearly from 0 over the warm-up, then falls along half a cosine from 1 to `floor`, itself a share of the
    peak: floor + (1 - floor) (1 + cos(pi t)) / 2 with t from 0 to 1, as transformers' `cosine_with_min_lr`.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _shortened(names: list[str]) -> str:
    return f"{names[:8]}" if len(names) <= 8 else f"{names[:8]} and {len(names) - 8} more"

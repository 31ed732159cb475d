"""Loads an export with LLaMA-Factory's own code and trains a few steps on it. Runs in LLaMA-Factory's environment.

    python load_llama_factory.py SETTINGS.json RESULT.json

The settings are `checking.LoaderRun`; the result is what its template made of each row, and the losses.
"""

from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

_IGNORED = -100


def _without_sound() -> None:
    """LLaMA-Factory imports torchaudio although no row has sound; PyPI's build of it needs CUDA."""
    try:
        import torchaudio  # noqa: F401, PLC0415
    except (ImportError, OSError):
        stand_in = types.ModuleType("torchaudio")
        stand_in.__spec__ = ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = stand_in


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    import transformers  # noqa: F401, PLC0415 - it looks for torchaudio itself, and must not find the stand-in

    _without_sound()
    import llamafactory  # noqa: PLC0415
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer  # noqa: PLC0415
    from llamafactory.hparams import get_train_args  # noqa: PLC0415
    from llamafactory.model import load_tokenizer  # noqa: PLC0415
    from llamafactory.train.tuner import run_exp  # noqa: PLC0415

    # As the export's README says, and small.
    arguments: dict[str, Any] = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": settings["model"],
        "dataset_dir": settings["export"],
        "dataset": settings["dataset"],
        "template": settings["template"] or "qwen2_vl",
        "default_system": "",
        "cutoff_len": 16384,
        "output_dir": settings["output"],
        "overwrite_cache": True,
        "cache_dir": settings["cache"],
        "per_device_train_batch_size": 4,
        "max_steps": settings["num_steps"] or 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "freeze_vision_tower": False,
        **settings["options"],
    }
    model_args, data_args, training_args, _, _ = get_train_args(dict(arguments))
    module = load_tokenizer(model_args)
    tokenizer = module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    dataset = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
    rows = [
        {
            "input": tokenizer.decode(row["input_ids"]),
            "learned": tokenizer.decode([token for token in row["labels"] if token != _IGNORED]),
            "images": [Path(image).name for image in row["images"] or []],
        }
        for row in dataset
    ]
    losses: list[float] = []
    if settings["num_steps"]:
        run_exp(dict(arguments))
        state = json.loads((Path(settings["output"]) / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    record = {"version": llamafactory.__version__, "rows": rows, "losses": losses}
    Path(sys.argv[2]).write_text(json.dumps(record))


if __name__ == "__main__":
    main()

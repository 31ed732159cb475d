"""Loads an export with ms-swift's own code and trains a few steps on it. Runs in ms-swift's environment.

    python load_ms_swift.py SETTINGS.json RESULT.json

The settings are `checking.LoaderRun`; the result is what its template made of each row, and the losses.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

_IGNORED = -100


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    os.environ["ROOT_IMAGE_DIR"] = settings["export"]
    import swift  # noqa: PLC0415 - it reads the environment
    from swift.pipelines.train.sft import SwiftSft  # noqa: PLC0415

    # As the export's README says, and small.
    options: dict[str, Any] = {
        "model": settings["model"],
        "model_type": "qwen2_5_vl",
        "template": settings["template"] or "qwen2_5_vl",
        "dataset": settings["data"],
        "system": "",
        "loss_scale": "default",
        "max_length": 16384,
        "truncation_strategy": "delete",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "attn_impl": "eager",
        "output_dir": settings["output"],
        "add_version": "false",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": settings["num_steps"] or 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "split_dataset_ratio": 0,
        "dataset_shuffle": "false",
        "report_to": "none",
        "use_hf": "true",
        "check_model": "false",
        **settings["options"],
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    pipeline = SwiftSft(arguments)
    template, tokenizer = pipeline.template, pipeline.tokenizer
    # ms-swift writes the id down that the token has in Qwen's own tokenizer. A small checkpoint has a small one.
    template.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    rows = []
    for row in pipeline._get_dataset()[0]:
        encoded = template.encode(dict(row), return_length=True)
        learned = [token for token in encoded["labels"] if token != _IGNORED]
        rows.append(
            {
                "input": tokenizer.decode(encoded["input_ids"]),
                "learned": tokenizer.decode(learned),
                "images": [Path(image["path"]).name for image in row["images"] or []],
            }
        )
    losses = []
    if settings["num_steps"]:
        pipeline.run()
        log = Path(settings["output"]) / "logging.jsonl"
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        losses = [entry["loss"] for entry in entries if "loss" in entry]
    Path(sys.argv[2]).write_text(json.dumps({"version": swift.__version__, "rows": rows, "losses": losses}))


if __name__ == "__main__":
    main()

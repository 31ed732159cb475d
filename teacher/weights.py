"""What can be read off a model's folder without loading it: its size, its attention heads, its data type.

vLLM decides by itself how to compute; these facts decide how it is started. Each may be unknown: a model on the hub
that was never downloaded has no folder, and a config.json may say anything.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import ServingError

_SERVED_BYTES = 2
"""Per value of the key-value cache, and of weights stored as float32: vLLM computes in 16 bits."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model; None where it cannot be told.

    num_heads, num_kv_heads: of the language model's attention. weights_bytes: of all weights as a GPU holds them.
    token_bytes: what one token takes in the key-value cache, over all layers and heads.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    weights_bytes: int | None = None
    token_bytes: int | None = None


def model_folder(model: str) -> Path | None:
    """Returns the folder of the weights, or None for a name on the hub.

    Raises ServingError: if it is named like a folder and there is none, or no model in it.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")):
            raise ServingError(f"there is no folder {model}; serve.model_path must hold the teacher's weights")
        return None
    if not (folder / "config.json").is_file():
        raise ServingError(f"the folder {model} holds no model: it has no config.json")
    return folder


def cached_folder(model: str, revision: str = "") -> Path | None:
    """Returns where the hub's client keeps a model that was downloaded before, or None."""
    home = Path(os.environ.get("HF_HOME") or _cache_home() / "huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repository = cache / f"models--{model.replace('/', '--')}"
    name = revision or "main"
    with contextlib.suppress(OSError):  # a commit is no reference; its snapshot has its own name
        name = (repository / "refs" / name).read_text("utf-8").strip()
    folder = repository / "snapshots" / name
    return folder if (folder / "config.json").is_file() else None


def model_facts(folder: Path | None) -> ModelFacts:
    """Returns what the files in a model's folder tell."""
    if folder is None:
        return ModelFacts()
    heads, kv_heads = _number(folder, "num_attention_heads"), _number(folder, "num_key_value_heads")
    kv_heads = kv_heads or heads
    hidden, layers = _number(folder, "hidden_size"), _number(folder, "num_hidden_layers")
    head_size = _number(folder, "head_dim") or (hidden // heads if hidden and heads else None)
    token_bytes = None
    if layers and kv_heads and head_size:
        token_bytes = 2 * layers * kv_heads * head_size * _SERVED_BYTES  # a key and a value each
    return ModelFacts(heads, kv_heads, _weights_bytes(folder), token_bytes)


def is_float32(folder: Path | None) -> bool:
    """Returns whether a folder says that its weights are stored as float32."""
    return folder is not None and "float32" in {model_setting(folder, name) for name in ("dtype", "torch_dtype")}


def model_setting(folder: Path, name: str) -> str | int | None:
    """Returns a text or number of the language model's configuration, or None when it cannot be told."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    # Vision-language models keep it one level down, or above for the whole.
    text = config.get("text_config")
    value = text[name] if isinstance(text, dict) and name in text else config.get(name)
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


def _number(folder: Path, name: str) -> int | None:
    value = model_setting(folder, name)
    return value if isinstance(value, int) and value > 0 else None


def _weights_bytes(folder: Path) -> int | None:
    """Returns the size of the weights on a GPU: as the index of the files says, else as large as the files are."""
    size = _indexed_bytes(folder / "model.safetensors.index.json")
    if size is None:
        # Some repositories hold the same weights in two formats; vLLM reads safetensors where there are any.
        files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
        size = sum(file.stat().st_size for file in files)
    if is_float32(folder):
        size = size * _SERVED_BYTES // 4
    return size or None


def _indexed_bytes(index: Path) -> int | None:
    try:
        size = json.loads(index.read_text("utf-8"))["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(size) if isinstance(size, int | float) and size > 0 else None


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()

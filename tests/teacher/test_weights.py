"""What is read off a model's folder: sizes computed by hand, and folders that tell nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from schemas.errors import ServingError
from teacher.weights import ModelFacts, cached_folder, is_float32, model_facts, model_folder

TEXT = {"num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 5120, "num_hidden_layers": 64}


def folder_with(folder: Path, config: object, **sizes: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, size in sizes.items():
        (folder / name.replace("_", ".")).write_bytes(b"0" * size)
    return folder


def test_the_size_of_a_token_is_that_of_its_keys_and_values(tmp_path: Path) -> None:
    facts = model_facts(folder_with(tmp_path, {"text_config": TEXT}, model_safetensors=1000))
    # Two of 64 layers, 8 heads, 5120 / 40 = 128 values, 2 bytes: 256 KiB, as Qwen2.5-VL-32B has.
    assert facts == ModelFacts(num_heads=40, num_kv_heads=8, weights_bytes=1000, token_bytes=256 * 1024)


def test_a_head_may_have_a_size_of_its_own_and_keys_as_many_heads_as_queries(tmp_path: Path) -> None:
    config = {"num_attention_heads": 4, "hidden_size": 999, "num_hidden_layers": 3, "head_dim": 16}
    facts = model_facts(folder_with(tmp_path, config))
    assert (facts.num_kv_heads, facts.token_bytes) == (4, 2 * 3 * 4 * 16 * 2)


def test_the_index_counts_before_the_files_and_safetensors_before_others(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, TEXT, a_safetensors=30, b_safetensors=12, c_bin=500)
    assert model_facts(folder).weights_bytes == 42
    (folder / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 40}}')
    assert model_facts(folder).weights_bytes == 40
    (folder / "model.safetensors.index.json").write_text('{"metadata": []}')
    assert model_facts(folder).weights_bytes == 42


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_float32_weights_are_served_in_half_their_size(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path, {**TEXT, name: "float32"}, model_safetensors=1000)
    assert is_float32(folder) and model_facts(folder).weights_bytes == 500


@pytest.mark.parametrize("config", [[], 3, {"num_attention_heads": "many", "hidden_size": True}, {"text_config": 1}])
def test_what_a_configuration_does_not_tell_is_unknown(tmp_path: Path, config: object) -> None:
    assert model_facts(folder_with(tmp_path, config)) == ModelFacts()
    (tmp_path / "config.json").write_text("{")
    assert model_facts(tmp_path) == ModelFacts() == model_facts(None)
    assert not is_float32(tmp_path) and not is_float32(None)


def test_a_hub_name_is_no_folder_and_a_missing_folder_is_no_hub_name(tmp_path: Path) -> None:
    assert model_folder("org/Teacher") is None
    with pytest.raises(ServingError, match="there is no folder"):
        model_folder(str(tmp_path / "missing"))
    with pytest.raises(ServingError, match="holds no model"):
        model_folder(str(tmp_path))
    assert model_folder(str(folder_with(tmp_path, TEXT))) == tmp_path


def test_a_downloaded_model_is_found_by_branch_and_by_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    repository = tmp_path / "hub" / "models--org--Teacher"
    snapshot = folder_with(repository / "snapshots" / "abc123", TEXT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cached_folder("org/Teacher") == cached_folder("org/Teacher", "abc123") == snapshot
    assert cached_folder("org/Teacher", "other") is None and cached_folder("org/Other") is None
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert cached_folder("org/Teacher") is None

"""What a model folder has to hold, and its digest."""

import json
import os
from pathlib import Path

import pytest

from fractal.errors import InputError, OutsideError
from fractal.generate import models

PARTS = {
    "config.json": json.dumps({"max_position_embeddings": 99}),
    "model.safetensors": "weights",
    "model-2.safetensors": "more weights",
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FRACTAL_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "tiny-instruct"
    made.mkdir()
    for name, text in PARTS.items():
        (made / name).write_text(text)
    return made


def test_a_whole_folder_is_taken(folder: Path) -> None:
    found = models.resolve(str(folder))
    assert (found.name, found.path, found.revision) == ("tiny-instruct", folder, None)
    assert models.context_length(folder) == 99


def test_a_missing_part_is_named(folder: Path) -> None:
    parts = {"config.json": "config.json", "model*": "weights", "tokenizer.json": "tokenizer", "chat*": "chat template"}
    for pattern, name in parts.items():
        removed = {file: file.read_bytes() for file in folder.glob(pattern)}
        for file in removed:
            file.unlink()
        with pytest.raises(InputError, match=f"has no {name}"):
            models.resolve(str(folder))
        for file, content in removed.items():
            file.write_bytes(content)


def test_a_template_in_the_tokenizers_settings_counts(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    models.check_folder(folder)


def test_what_is_no_folder_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        models.resolve(str(folder / "config.json"))
    with pytest.raises(InputError, match="no such folder"):
        models.resolve(str(folder / "nothing"))


def test_a_hub_that_does_not_answer_is_something_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(OutsideError, match="the model hub does not answer"):
        models.resolve("someone/some-model")


def test_a_damaged_configuration_is_named(folder):
    for content in (b"", b"{", b"[]", b"\xff"):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(InputError, match=r"config\.json is not"):
            models.check_folder(folder)


def test_the_digest_knows_the_weights(folder):
    seen = [models.weight_digest(folder)]
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    seen.append(models.weight_digest(folder))
    (folder / "model-2.safetensors").rename(folder / "model-3.safetensors")
    seen.append(models.weight_digest(folder))
    (folder / "model-3.safetensors").unlink()
    seen.append(models.weight_digest(folder))
    assert len(set(seen)) == 4
    (folder / "tokenizer.json").write_text("[]")
    assert models.weight_digest(folder) == seen[-1]


def test_the_digest_is_the_same_elsewhere(folder, tmp_path):
    before = models.weight_digest(folder)
    moved = folder.rename(tmp_path / "moved")
    assert models.weight_digest(moved) == before


def test_the_digest_is_computed_once(folder, tmp_path, monkeypatch):
    before = models.weight_digest(folder)
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    assert note.read_text() == before

    def refuse(*_):
        raise AssertionError("the weights were read again")

    monkeypatch.setattr(models.hashlib, "file_digest", refuse)
    assert models.weight_digest(folder) == before
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(AssertionError):
        models.weight_digest(folder)


def test_a_folder_is_the_same_however_it_is_written(folder, monkeypatch):
    found = models.resolve(str(folder))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert models.resolve(".") == models.resolve("../tiny-instruct") == models.resolve("~/tiny-instruct") == found
    for name in ("./none", "~/none", "~nobody-of-this-name/none"):
        with pytest.raises(InputError, match="no such folder"):
            models.resolve(name)

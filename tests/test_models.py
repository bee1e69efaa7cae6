"""What a model folder has to hold, and its digest."""

import json
from pathlib import Path

import pytest

from fractal import models
from fractal.records import InputError, OutsideError

PARTS = {
    "config.json": json.dumps({"max_position_embeddings": 99}),
    "model.safetensors": "weights",
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


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer"),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_a_missing_part_is_named(folder: Path, missing: str, complaint: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(InputError, match=complaint):
        models.resolve(str(folder))


def test_a_template_in_the_tokenizers_settings_counts(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    models.check_folder(folder)


def test_what_is_no_folder_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        models.resolve(str(folder / "config.json"))
    with pytest.raises(InputError, match="no such folder"):
        models.resolve(str(folder / "nothing"))


def test_the_digest_follows_the_weights(folder: Path) -> None:
    before = models.weight_digest(folder)
    assert models.weight_digest(folder) == before
    (folder / "model.safetensors").write_text("other weights")
    assert models.weight_digest(folder) != before


def test_a_hub_that_does_not_answer_is_something_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(OutsideError, match="the model hub does not answer"):
        models.resolve("someone/some-model")

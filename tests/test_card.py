"""Model cards: what they say is what the folder holds, and nothing is measured that was not."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from flashhead.cli import main
from flashhead.convert.card import facts_of, read_facts, write_card
from flashhead.convert.checksums import write_checksums
from flashhead.convert.head import convert
from flashhead.convert.licence import UNKNOWN, License, hub_id_of, license_of
from flashhead.errors import FlashHeadError
from flashhead.models import cache_dir

UNMEASURED = "Not measured yet: `flashhead verify FOLDER --against BASE --write-card`"
BASE_CARD = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n\nA model.\n"


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A W8A16 variant of the tiny model and what `convert` said of it."""
    out = tmp_path_factory.mktemp("card") / "tiny-w8"
    # the tiny model's 48 dimensions fit no group of w4a16
    settings = {"progress": False, "calibration_tokens": 64, "quantize": "w8a8-int8"}
    return out, convert(tiny_folder, out, bits=2, planes=1, **settings)


@pytest.fixture
def folder(made, tiny_folder, tmp_path):
    """A copy with its card."""
    out = shutil.copytree(made[0], tmp_path / "tiny-FlashHead-W8A8")
    report = made[1] | {"quantize": made[1]["quantize"] | {"method": "round to nearest"}}
    write_card(out, facts_of(out, tiny_folder, report))
    write_checksums(out)
    return out


def test_front_matter(folder, tiny_folder):
    """A key that the hub does not know, or a path of the machine it was made on."""
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "unknown"
    assert "base_model" not in data  # no hub id is known for a folder
    assert {"flashhead", "flashhead-codes", "compressed-tensors", "w8a8-int8"} <= set(data["tags"])
    assert str(folder.parent) not in str(card)
    assert tiny_folder not in str(card)


def test_body_says_what_the_folder_holds(folder):
    """Figures of another index, or a licence that nobody gave."""
    text = (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())["flashhead"]
    assert "2 bits a dimension, 1 plane of 2 more bits" in text
    assert f"{config['index_bytes'] / 1e6:,.1f} MB" in text
    assert "Linear layers in W8A8-INT8: 8-bit weights, a scale a row" in text
    assert "Method: round to nearest." in text
    assert "Licence: unknown (no file of the base model names one)" in text
    assert UNMEASURED in text
    assert "| what | figure |" not in text


def test_the_code_in_the_card_runs(folder, monkeypatch, capsys):
    """Code that was never run."""
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder.parent)  # the card calls the folder by its name
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_card_is_the_same_from_the_folder_alone(folder):
    """What only the card knows (method, base, licence) is lost when it is written anew."""
    before = (folder / "README.md").read_text()
    write_card(folder, read_facts(folder))
    assert (folder / "README.md").read_text() == before


def test_verify_writes_what_it_measured(folder, tiny_folder, capsys):
    """Figures in the card that are not those of verify.json, or of an index that was replaced."""
    command = ["verify", str(folder), "--positions", "40", "--against", tiny_folder]
    assert main([*command, "--write-card"]) == 0
    assert "wrote verify.json and README.md" in capsys.readouterr().out
    measured = json.loads((folder / "verify.json").read_text())
    text = (folder / "README.md").read_text()
    assert UNMEASURED not in text
    assert f"{measured['positions']['certified_bytes_fraction']:.1%} of the head's bytes" in text
    assert f"KL {measured['against']['kl']:.1e} nats, perplexity" in text
    assert measured["hardware"]["cpu"] in text
    assert f"{measured['speed']['speedup']:.2f}x" in text
    assert str(folder.parent) not in json.dumps(measured) + text
    assert main([*command]) == 0, "a card that was written anew must not fail the checksums"
    assert not [path for path in folder.iterdir() if path.name.endswith(".partial")]
    config = json.loads((folder / "config.json").read_text())
    config["flashhead"]["index_sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    write_card(folder, read_facts(folder))
    assert UNMEASURED in (folder / "README.md").read_text()


def test_a_card_written_by_hand_stays(folder):
    """Somebody's own README lost."""
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    with pytest.raises(FlashHeadError, match="not written by flashhead"):
        write_card(folder, read_facts(folder))
    assert (folder / "README.md").read_text().endswith("Mine.\n")


def test_licences(tmp_path):
    """A licence guessed, or lost on the way."""
    folder = tmp_path / "base"
    folder.mkdir()
    assert license_of(str(folder)) == UNKNOWN
    (folder / "LICENSE.txt").write_text("Terms of nobody")
    assert license_of(str(folder)) == License("other", "LICENSE.txt", "LICENSE.txt", "LICENSE.txt")
    (folder / "LICENSE").write_text("  Apache License\n   Version 2.0, January 2004\n")
    assert license_of(str(folder)).id == "apache-2.0"
    (folder / "config.json").write_text('{"license": "mit"}')
    assert license_of(str(folder)) == License("mit", found_in="config.json")
    (folder / "README.md").write_text(BASE_CARD)
    assert license_of(str(folder)) == License("other", "own", "LICENSE", "README.md")
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(BASE_CARD)
    assert hub_id_of(str(snapshot)) == "owner/name"
    link = "https://huggingface.co/owner/name/blob/main/LICENSE"
    assert license_of(str(snapshot)) == License("other", "own", link, "README.md")


def test_the_licence_and_base_reach_the_card(made, tmp_path):
    """A card without the base model's terms."""
    base = tmp_path / "models--owner--name" / "snapshots" / "abc"
    base.mkdir(parents=True)
    (base / "README.md").write_text(BASE_CARD)
    out = shutil.copytree(made[0], tmp_path / "out")
    write_card(out, facts_of(out, str(base), made[1], name="name-FlashHead-W8A8"))
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "owner/name"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert (card.data.license, card.data.license_name) == ("other", "own")
    assert "Licence: [own](https://huggingface.co/owner/name/blob/main/LICENSE)" in str(card)
    assert "# name-FlashHead-W8A8" in str(card)


def test_embedded_models_are_known(monkeypatch, tmp_path):
    """A variant of an embedded model that names no base."""
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path))
    (cache_dir() / "models" / "gemma-3-270m").mkdir(parents=True)
    assert hub_id_of("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id_of(str(cache_dir() / "models" / "gemma-3-270m")) == "google/gemma-3-270m"


def test_clusters_and_dense_bodies(tiny_folder, tmp_path):
    """A card that promises certificates for clusters, or quantization that was not done."""
    out = tmp_path / "clusters"
    report = convert(tiny_folder, out, head="clusters", progress=False, calibration_tokens=64)
    write_card(out, facts_of(out, tiny_folder, report))
    text = (out / "README.md").read_text()
    assert "It certifies nothing." in text
    assert "**Body.** Unchanged." in text
    assert "base_model_relation" not in text

"""`flashhead push` against a hub on this machine: what arrives is the folder, byte by byte."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub import TOKEN, FakeHub

from flashhead.convert.card import facts_of, write_card
from flashhead.convert.checksums import write_checksums
from flashhead.convert.head import convert

EXTRA = {
    ".env": "hidden",
    ".cache/huggingface/x": "hidden",
    "pytorch_model.bin": "pickled or raw arrays, which nothing here reads",
    "train.py": "code that no config names",
    "credentials.json": "not a file that the model needs",
    "optimizer.safetensors": "weights that the weights' index does not name",
}


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A converted folder with card and checksums."""
    out = tmp_path_factory.mktemp("push") / "tiny-FlashHead"
    report = convert(tiny_folder, out, progress=False, calibration_tokens=64, bits=2, planes=1)
    write_card(out, facts_of(out, tiny_folder, report))
    write_checksums(out)
    return out


@pytest.fixture
def folder(made, tmp_path):
    """A copy with files that nobody should get."""
    out = shutil.copytree(made, tmp_path / "tiny-FlashHead")
    for name in EXTRA:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("SECRET=1")
    return out


@pytest.fixture
def hub():
    with FakeHub() as running:
        yield running


@pytest.fixture
def push(hub, tmp_path):
    """Run the command line with this hub; the user's own token and caches are out of reach."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        mine = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        return subprocess.run(
            [sys.executable, "-m", "flashhead", "push", *args],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
            env=clean | mine,
        )

    return run


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return str(path)


def one_line(done, *wanted: str) -> None:
    """A mistake: exit code 2, one line, no token in it."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("ok ")]
    assert len(lines) == 1, done.stderr
    assert all(text in lines[0] for text in wanted), lines[0]
    assert TOKEN not in done.stdout + done.stderr


def test_what_arrives_is_the_folder(made, folder, hub, push, token_file):
    """A file cut off on the way, one too many, a token on the screen, or a public repository."""
    done = push(str(folder), "me/tiny", "--private", "--token-file", token_file, "--json")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    wanted = {
        path.relative_to(made).as_posix(): path.read_bytes()
        for path in made.rglob("*")
        if path.is_file()
    }
    sent = {name: data for (_, _, name), data in hub.files.items()}
    assert sent == wanted
    assert {(repo, branch) for repo, branch, _ in hub.files} == {("me/tiny", "main")}
    assert document["files"] == {name: len(data) for name, data in sorted(wanted.items())}
    assert document["bytes"] == sum(map(len, wanted.values()))
    assert document["left_out"] == EXTRA
    assert (document["commit"], document["url"]) == ("abc", f"{hub.url}/me/tiny")
    assert hub.repos["me/tiny"]["visibility"] == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    again = push(str(folder), "me/tiny", "--revision", "w8", "--token-file", token_file)
    assert again.returncode == 0, again.stderr
    assert {name: data for (_, branch, name), data in hub.files.items() if branch == "w8"} == wanted


def test_dry_run_sends_nothing(made, folder, hub, push):
    """A dry run that is none, or that names other files than are sent."""
    done = push(str(folder), "me/tiny", "--dry-run", "--revision", "w8")
    assert done.returncode == 0, done.stderr
    assert (hub.repos, hub.files, hub.tokens) == ({}, {}, set())
    sizes = {
        path.relative_to(made).as_posix(): path.stat().st_size
        for path in made.rglob("*")
        if path.is_file()
    }
    lines = done.stdout.splitlines()
    listed = {
        line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines[: len(sizes)]
    }
    assert listed == sizes
    total = f"{len(sizes)} files, {sum(sizes.values()):,} bytes would be sent to {hub.url}/me/tiny"
    assert lines[len(sizes)] == f"{total}, branch w8"
    assert set(lines[len(sizes) + 1 :]) == {f"left out: {n} ({w})" for n, w in EXTRA.items()}


@pytest.mark.parametrize(
    ("start", "status", "message"),
    [
        ("/api/repos/create", 401, "not logged in, or a token that is not valid"),
        ("/api/repos/create", 500, "the hub answered 500"),
        ("/api/models/me/tiny/preupload", 404, "no such repository or branch"),
        ("/api/models/me/tiny/commit", 403, "the token may not write there"),
        ("/lfs", 400, "the hub answered 400"),
    ],
)
def test_a_hub_that_refuses(made, hub, push, token_file, start, status, message):
    """A traceback, or the token in an error message."""
    hub.answer_with[start] = status
    done = push(str(made), "me/tiny", "--token-file", token_file, "--no-verify")
    one_line(done, f"{hub.url}/me/tiny", message)
    assert hub.files == {}


def test_a_hub_that_is_not_there(made, push, hub):
    """A traceback of the HTTP library."""
    hub.shutdown()
    hub.server_close()
    one_line(push(str(made), "me/tiny", "--no-verify"), f"{hub.url}/me/tiny: no upload")


def test_broken_folders_are_not_sent(folder, hub, push, tmp_path):
    """Half a model on the hub."""
    out = str(folder)
    (folder / "model.safetensors").rename(folder / "gone")
    one_line(push(out, "me/tiny"), "files: model.safetensors: missing", "nothing was sent")
    one_line(push(out, "me/tiny", "--no-verify"), "model.safetensors: missing")
    (folder / "gone").rename(folder / "model.safetensors")
    config = folder / "generation_config.json"
    config.write_text(config.read_text() + " ")
    one_line(push(out, "me/tiny"), "checksums: generation_config.json")
    partial = folder.rename(folder.with_name(".tiny.partial-1"))
    one_line(push(str(partial), "me/tiny", "--no-verify"), "did not finish")
    assert hub.repos == {}


def test_links_out_of_the_folder(folder, hub, push, tmp_path):
    """A file of the user's that a link carries to the hub."""
    (tmp_path / "secret").write_text("mine")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    done = push(str(folder), "me/tiny", "--no-verify", "--dry-run")
    one_line(done, "LICENSE: a link to outside of")
    assert hub.repos == {}


def test_mistakes(made, push, tmp_path):
    """The wait for a hub, for a mistyped argument."""
    one_line(push(str(made), "a/b/c", "--no-verify"), "repository 'a/b/c': wanted owner/name")
    (tmp_path / "empty").write_text(" \n")
    one_line(push(str(made), "me/tiny", "--token-file", str(tmp_path / "empty")), "wanted one word")
    one_line(push(str(tmp_path / "no"), "me/tiny"), "no such folder")

"""Heads to time without a model: made-up ones, and ones from a file that may be a stranger's."""

import math

import pytest
import torch
from safetensors.torch import save_file

from flashhead.bench.head_file import read_head_file, write_head_file
from flashhead.bench.synthetic import LOGIT_SPREAD, make_problem, shape_of
from flashhead.errors import FlashHeadError


@pytest.fixture(scope="module")
def problem():
    return make_problem("tiny", (2050, 96), states=264, calibration=512)


def test_synthetic_statistics(problem):
    """Catches hidden states without a mean direction, rows without clusters, spectrum or spread of
    norms, and target rows that do not win: the search would then read far too much or too little.
    """
    weight, hidden = problem.weight.float(), problem.hidden.float()
    assert weight.shape == (2050, 96)
    assert (len(hidden), len(problem.calibration)) == (264, 512)
    assert problem.synthetic
    mean = hidden.mean(0)
    share = (hidden @ (mean / mean.norm())).square().mean() / hidden.square().sum(1).mean()
    assert 0.2 < share < 0.4
    centred = weight - weight.mean(0)
    spread = torch.linalg.svdvals(centred).square()
    assert 0.2 < spread[0] / spread.sum() < 0.45  # k^-1.1 over 95 dimensions: 0.29
    assert 0.15 < centred.norm(dim=1).log().std() < 0.5
    unit = torch.nn.functional.normalize(centred, dim=1)
    near, far = (unit[:1984] * unit[shift : 1984 + shift] for shift in (1, 64))
    assert near.sum(1).mean() > far.sum(1).mean() + 0.2
    logits = hidden @ centred.T
    assert LOGIT_SPREAD < logits.std(1).median() < 2.5 * LOGIT_SPREAD  # the target raises it
    best = logits.amax(1) - logits.mean(1)
    assert (best > 4 * LOGIT_SPREAD).double().mean() > 0.95


def test_synthetic_is_repeatable(problem):
    """Catches a document that cannot be measured again, and one set of states for two uses."""
    same = make_problem("tiny", (2050, 96), states=264, calibration=512)
    other = make_problem("tiny", (2050, 96), states=264, calibration=512, seed=1)
    assert torch.equal(problem.weight, same.weight)
    assert torch.equal(problem.hidden, same.hidden)
    assert not torch.equal(problem.weight, other.weight)
    assert not (problem.hidden[0] == problem.calibration).all(1).any()


def test_unknown_shape():
    """Catches a KeyError in place of the known names."""
    assert shape_of("llama-3.2-1b") == (128_256, 2_048)
    with pytest.raises(FlashHeadError, match=r"shape 'x': wanted one of llama-3\.2-1b"):
        shape_of("x")


def test_head_file_round_trip(problem, tmp_path):
    """Catches tensors that change places, and a file that claims to be synthetic."""
    path = tmp_path / "head.safetensors"
    write_head_file(problem, path)
    assert [found.name for found in tmp_path.iterdir()] == ["head.safetensors"]
    found = read_head_file(path)
    for name in ("weight", "hidden", "calibration"):
        assert torch.equal(getattr(found, name), getattr(problem, name))
    assert (found.name, found.synthetic) == ("tiny", False)


def head_tensors():
    rows = {"weight": (9, 4), "hidden": (3, 4), "calibration": (2, 4)}
    return {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in rows.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": None}, "tensors calibration, weight; wanted weight, hidden, calibration"),
        ({"other": torch.ones(2)}, "tensors calibration, hidden, other, weight"),
        ({"hidden": torch.ones(3, 5)}, r"'hidden' has shape \[3, 5\]"),
        ({"hidden": torch.ones(3)}, r"'hidden' has shape \[3\]"),
        ({"calibration": torch.ones(0, 4)}, r"'calibration' has shape \[0, 4\]"),
        ({"weight": torch.ones(9, 4, dtype=torch.int8)}, "'weight' is I8, wanted BF16"),
        ({"weight": torch.full((9, 4), math.nan)}, "'weight' holds NaN or infinity"),
    ],
)
def test_head_file_errors(tmp_path, change, message):
    """Catches a stranger's file that ends in a traceback."""
    tensors = {k: v for k, v in (head_tensors() | change).items() if v is not None}
    path = tmp_path / "head.safetensors"
    save_file(tensors, path, metadata={"name": "x"})
    with pytest.raises(FlashHeadError, match=message):
        read_head_file(path)


def test_head_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """Catches sizes that are looked at after the memory is taken, a name that floods the screen,
    and a file of another kind.
    """
    path = tmp_path / "head.safetensors"
    for metadata in (None, {"name": ""}, {"name": "a\nb"}, {"name": "x" * 81}):
        save_file(head_tensors(), path, metadata=metadata)
        with pytest.raises(FlashHeadError, match="metadata name"):
            read_head_file(path)
    monkeypatch.setattr("flashhead.bench.head_file.MOST_BYTES", 100)
    save_file(head_tensors(), path, metadata={"name": "x"})
    with pytest.raises(FlashHeadError, match="112 bytes of tensors, wanted at most 100"):
        read_head_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FlashHeadError, match="not a readable safetensors file"):
        read_head_file(path)
    path.write_text("{}")
    with pytest.raises(FlashHeadError, match="not a readable safetensors file"):
        read_head_file(path)

"""A converted folder behind plain `vllm serve FOLDER`, asked by OpenAI's client.

What is right is what the same folder says with FLASHHEAD_ENABLED=0: a dense server answers every
request first, alone and in batches, and has ended before FlashHead's starts.
"""

import concurrent.futures
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from served import (
    CHAT,
    COLOURS,
    COMPLETIONS,
    COUNTRY,
    EDITED,
    GREEDY,
    LOGPROBS,
    MALFORMED,
    NO_JSON,
    STRUCTURED,
    create,
    only,
    require_equal,
    send,
    text_of_chunk,
)

from flashhead.integrations.vllm.openai_answers import WITH_TOKENS, Answer, ask_for_tokens
from flashhead.integrations.vllm.serving import Server

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.model
COMPARED = {"greedy": GREEDY, "edited": EDITED, "structured": STRUCTURED}
MIXED_ROUNDS = 4
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Dense:
    """What the dense server says, by group and name of a request.

    Args:
        alone: answers with log-probabilities.
        batched: other answers, of the mixed batch.
        logprobs: responses to `LOGPROBS`.
    """

    alone: dict[Key, Answer]
    batched: dict[Key, list[Answer]]
    logprobs: dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def dense(start_server: Callable[..., Server]) -> Dense:
    """The dense server's answers to everything."""
    keys = [(group, name) for group, requests in COMPARED.items() for name in requests]
    with start_server("dense", FLASHHEAD_ENABLED="0") as server:
        client = client_of(server)
        alone = {key: only(send_with_logprobs(client, key)) for key in keys}
        batched: dict[Key, list[Answer]] = {key: [] for key in keys}
        for _ in range(MIXED_ROUNDS):
            for key, response in mixed_batch(client, send_with_logprobs).items():
                batched[key].append(only(response))
        logprobs = {name: send(client, request) for name, request in LOGPROBS.items()}
        assert server.statistics() == []
    return Dense(alone, batched, logprobs)


def send_with_logprobs(client: Any, key: Key) -> dict[str, Any]:
    """A request of `COMPARED` as the dense server gets it."""
    request = COMPARED[key[0]][key[1]]
    return send(client, request, **ask_for_tokens(request.path, request.body))


def send_with_tokens(client: Any, key: Key) -> dict[str, Any]:
    """The same as FlashHead's gets it."""
    return send(client, COMPARED[key[0]][key[1]], **WITH_TOKENS)


def mixed_batch(client: Any, ask: Callable[[Any, Key], dict[str, Any]]) -> dict[Key, Any]:
    """Responses to all of `COMPARED` at once, with two sampled requests among them."""
    keys = [(group, name) for group, requests in COMPARED.items() for name in requests]
    with concurrent.futures.ThreadPoolExecutor(len(keys) + 2) as pool:
        sampled = [pool.submit(send, client, GREEDY["story"], temperature=1.0) for _ in range(2)]
        responses = list(pool.map(lambda key: ask(client, key), keys))
        for future in sampled:
            future.result()
    return dict(zip(keys, responses, strict=True))


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server], dense: Dense) -> Iterator[Server]:
    """FlashHead's server; the dense one has ended."""
    with start_server("flash") as server:
        yield server
    assert server.processes() == []


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return client_of(server)


def client_of(server: Server) -> Any:
    """OpenAI's client, without proxies and retries."""
    return openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        timeout=120,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )


def rows(server: Server) -> tuple[int, int]:
    """Rows searched and rows dense, so far."""
    (head,) = server.statistics()
    return head["searched_rows"], head["dense_rows"]


def test_head_is_searched(server: Server, client: Any) -> None:
    """Catches a server that quietly serves the dense head, and a listener that tells every row
    dense or none: greedy and sampled tokens are searched, penalised ones are not.
    """
    assert re.search(r"FlashHead on lm_head: index \S+smollm2 ", server.log_text())
    searched, whole = rows(server)
    send(client, GREEDY["france"], ignore_eos=True)
    send(client, GREEDY["france"], ignore_eos=True, temperature=0.8, seed=1)
    assert rows(server) == (searched + 2 * 64, whole)
    send(client, EDITED["frequency"], ignore_eos=True)
    assert rows(server) == (searched + 2 * 64, whole + 48)
    (head,) = server.statistics()
    assert head["certified_fraction"] == 1
    assert head["bytes_fraction"] < 0.5


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_equals_dense(
    name: str, client: Any, dense: Dense, record_property: Callable[..., None]
) -> None:
    """Catches a wrong winner: a difference must be a tie of the dense head's bf16 logits."""
    key = ("greedy", name)
    tie = require_equal([dense.alone[key]], send_with_tokens(client, key))
    if tie is not None:
        record_property("tie", tie)
        print(f"{name}: {tie}")


@pytest.mark.parametrize("name", EDITED)
def test_edited_logits_equal_dense(name: str, client: Any, dense: Dense) -> None:
    """Catches penalties, biases and masks that edit estimates instead of logits."""
    key = ("edited", name)
    assert require_equal([dense.alone[key]], send_with_tokens(client, key)) is None


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_output_equals_dense(name: str, client: Any, dense: Dense) -> None:
    """Catches a mask over logits that are estimates, and a grammar that is not followed."""
    key = ("structured", name)
    response = send_with_tokens(client, key)
    require_form(name, only(response))
    assert require_equal([dense.alone[key]], response) is None


def require_form(name: str, answer: Answer) -> None:
    """What a structured request asked for."""
    if name.startswith("json"):
        document = json.loads(answer.text)
        assert list(document) == COUNTRY["required"]
        assert document["continent"] in COUNTRY["properties"]["continent"]["enum"]
    elif name.startswith("choice"):
        assert answer.text in COLOURS
    else:
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", answer.text)


@pytest.mark.parametrize("name", LOGPROBS)
def test_logprobs_equal_dense(name: str, client: Any, dense: Dense) -> None:
    """Catches log-probabilities of estimates."""
    response = send(client, LOGPROBS[name])
    assert only(response).text == only(dense.logprobs[name]).text
    found, wanted = tops_of(response), tops_of(dense.logprobs[name])
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=0.01)


def tops_of(response: dict[str, Any]) -> list[dict[str, float]]:
    """Log-probabilities of each position: the token's own under the key "", and the best ones."""
    found = response["choices"][0]["logprobs"]
    if "content" in found:
        return [
            {
                "": entry["logprob"],
                **{top["token"]: top["logprob"] for top in entry["top_logprobs"]},
            }
            for entry in found["content"]
        ]
    pairs = zip(found["token_logprobs"], found["top_logprobs"], strict=True)
    # the first token of a prompt has none
    return [{"": own, **tops} for own, tops in pairs if own is not None]


@pytest.mark.parametrize("name", ["france", "chat", "stop"])
def test_stream_equals_whole(name: str, client: Any) -> None:
    """Catches tokens lost, doubled or changed between the chunks."""
    whole = only(send(client, GREEDY[name]))
    chunks = list(create(client, GREEDY[name], stream=True))
    assert "".join(map(text_of_chunk, chunks)) == whole.text
    assert len(chunks) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.finish


def test_stop_strings(client: Any) -> None:
    """Catches a server that runs past a stop string, or that keeps one not asked for."""
    stopped = only(send(client, GREEDY["stop"]))
    assert stopped.finish == "stop"
    assert " eight" not in stopped.text
    kept = only(send(client, GREEDY["stop kept"]))
    assert kept.finish == "stop"
    assert kept.text.endswith(".")


@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}], ids=str)
def test_seed_repeats(more: dict[str, Any], client: Any) -> None:
    """Catches sampling that a request's own generator does not decide."""
    story = GREEDY["story"]
    one, same, other = (
        only(send(client, story, temperature=1.0, seed=seed, **more)).text for seed in (7, 7, 8)
    )
    assert one == same != other


def test_two_choices(client: Any) -> None:
    """Catches choices of one request that share their draws, or that lose their seed."""
    found = []
    for _ in range(2):
        response = send(client, GREEDY["story"], temperature=1.0, n=2, seed=3)
        assert [choice["index"] for choice in response["choices"]] == [0, 1]
        found.append([choice["text"] for choice in response["choices"]])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_mixed_batch(server: Server, client: Any, dense: Dense) -> None:
    """Catches rows of a batch that are told apart wrongly: each request gets what it asked for.

    A bf16 body says something else in a batch than alone, so the dense server's batches count too.
    """
    before = rows(server)
    responses = mixed_batch(client, send_with_tokens)
    assert all(now > then for now, then in zip(rows(server), before, strict=True))
    for name in GREEDY:
        key = ("greedy", name)
        tie = require_equal([dense.alone[key], *dense.batched[key]], responses[key])
        if tie is not None:
            print(f"{name}: {tie}")
    for name in STRUCTURED:
        require_form(name, only(responses["structured", name]))
    allowed = only(responses["edited", "allowed"])
    assert set(allowed.tokens) <= set(EDITED["allowed"].body["allowed_token_ids"])
    assert "Paris" not in only(responses["edited", "bad words"]).text
    assert 7042 not in only(responses["edited", "bias"]).tokens
    assert len(only(responses["edited", "min tokens"]).tokens) >= 24


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_body(name: str, client: Any, dense: Dense) -> None:
    """Catches a body that is served, or that takes the engine down."""
    with pytest.raises(openai.BadRequestError):
        client.completions.create(
            model="model", prompt="Hi", max_tokens=2, extra_body=MALFORMED[name]
        )
    still_answers(client, dense)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_no_json(path: str, server: Server, client: Any, dense: Dense) -> None:
    """The same of a body that is no JSON object."""
    for data in NO_JSON:
        status, _ = server.send("POST", path, data)
        assert status == 400, data
    still_answers(client, dense)


def test_unknown_model(client: Any, dense: Dense) -> None:
    """Catches a server that answers for any name."""
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="Hi")
    still_answers(client, dense)


def test_client_leaves(server: Server, client: Any, dense: Dense) -> None:
    """Catches rows that stay in the batch, or get lost, when a client goes in the middle."""
    for _ in range(4):
        stream = create(client, GREEDY["story"], stream=True, max_tokens=512)
        next(iter(stream))
        stream.close()
    still_answers(client, dense)
    assert server.is_healthy()


def still_answers(client: Any, dense: Dense) -> None:
    """The next request is answered as if nothing had been."""
    key = ("greedy", "one token")
    require_equal([dense.alone[key]], send_with_tokens(client, key))

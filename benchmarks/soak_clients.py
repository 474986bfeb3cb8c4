"""The clients of a soak test: each sends a request and judges what comes of it."""

import asyncio
import collections
import dataclasses
import random
from typing import Any

import httpx2  # what openai speaks HTTP with; it lets errors amid a stream through
import openai
from soak_requests import CHAT, Request, problem_of

from flashhead.integrations.vllm.openai_answers import (
    WITH_TOKENS,
    Answer,
    Difference,
    ask_for_tokens,
    compare,
    read_answers,
)
from flashhead.integrations.vllm.serving import Server

REQUEST_SECONDS = 180.0


@dataclasses.dataclass
class Tally:
    """What has happened so far.

    Args:
        dense: the dense head's answers to each request of the fixed set, those under load too.
        learns: greedy answers are the dense head's, to be added to these.
    """

    dense: list[list[Answer]]
    learns: bool = False
    outcomes: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    greedy: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    ties: collections.Counter[tuple[int, Difference]] = dataclasses.field(
        default_factory=collections.Counter
    )
    wrong: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    memory: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def judge(self, number: int, answer: Answer) -> None:
        """A greedy answer beside the dense head's."""
        dense = self.dense[number]
        found = compare(dense, answer)
        if self.learns:
            self.greedy["equal" if found is None else "another"] += 1
            if found is not None:
                dense.append(answer)
        elif found is None:
            alone = compare(dense[:1], answer) is None
            self.greedy["equal" if alone else "equal to the dense head's under load"] += 1
        elif found.is_tie:
            self.greedy["tie"] += 1
            self.ties[number, found] += 1
        else:
            self.greedy["wrong"] += 1
            self.wrong.append(
                {
                    "request": number,
                    **dataclasses.asdict(found),
                    "text": answer.text,
                    "finish": answer.finish,
                    "dense_text": dense[0].text,
                    "dense_finish": dense[0].finish,
                }
            )

    def fail(self, request: Request, reason: str) -> None:
        """Note that a request went wrong."""
        self.failures.append(f"{request.kind} {request.path} {str(request.body)[:300]}: {reason}")


async def ask(client: Any, request: Request, tally: Tally, rng: random.Random) -> None:
    """Send one request and judge what comes of it."""
    try:
        outcome = await OUTCOMES.get(request.kind, whole)(client, request, tally, rng)
    except openai.APIStatusError as error:
        outcome = str(error.status_code)
    except openai.APITimeoutError:
        outcome = f"no answer in {REQUEST_SECONDS:.0f} s"
    except (openai.APIError, httpx2.HTTPError) as error:
        outcome = f"{error!r} ({error.__cause__!r})"
    tally.outcomes[request.kind, outcome] += 1
    if outcome not in (str(request.status), "left"):
        tally.fail(request, f"{outcome}, wanted {request.status}")


async def create(client: Any, request: Request) -> Any:
    """The response, or its stream."""
    body = request.body
    if isinstance(body, bytes):
        return await client.post(request.path.removeprefix("/v1"), content=body, cast_to=object)
    stream, model = body.get("stream") is True, body.get("model", "model")
    # everything in extra_body, so that wrong types reach the server
    if request.path == CHAT:
        return await client.chat.completions.create(
            model=model, messages=[], stream=stream, extra_body=body
        )
    return await client.completions.create(model=model, prompt="", stream=stream, extra_body=body)


async def whole(client: Any, request: Request, tally: Tally, _rng: random.Random) -> str:
    """A response as one piece."""
    response = await create(client, request)
    if request.kind != "malformed":
        problem = problem_of(request, response.to_dict())
        if problem is not None:
            tally.fail(request, problem)
    return "200"


async def greedy(client: Any, request: Request, tally: Tally, _rng: random.Random) -> str:
    """One of the fixed set, whole or streamed."""
    assert isinstance(request.body, dict)
    body = {**request.body, **WITH_TOKENS}
    if tally.learns:
        body = {**ask_for_tokens(request.path, request.body), "stream": False}
    response = await create(client, dataclasses.replace(request, body=body))
    if body["stream"]:
        tally.judge(request.number, await read_stream(response))
    else:
        (answer,) = read_answers(response.to_dict())
        tally.judge(request.number, answer)
    return "200"


async def read_stream(stream: Any) -> Answer:
    """The chunks of a stream as one answer."""
    text, tokens, finish = "", [], None
    async for chunk in stream:
        for choice in chunk.to_dict()["choices"]:
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            tokens += choice.get("token_ids") or []
            finish = choice["finish_reason"] or finish
    return Answer(text, tuple(tokens), finish)


async def cancelled(client: Any, request: Request, _tally: Tally, rng: random.Random) -> str:
    """A client that leaves; answers that end before it does are fine too."""
    if request.leave_after < 0:
        pending = asyncio.ensure_future(create(client, request))
        done, _ = await asyncio.wait([pending], timeout=rng.uniform(0.001, 0.3))
        if not done:
            pending.cancel()
            await asyncio.wait([pending])
            return "left"
        await pending.result().close()
        return "left"
    stream = await create(client, request)
    chunks = 0
    async for _ in stream:
        chunks += 1
        if chunks == request.leave_after:
            await stream.close()
            return "left"
    return "200"


OUTCOMES = {"greedy": greedy, "cancelled": cancelled}
"""How a kind is asked; the others: `whole`."""


def client_of(server: Server) -> Any:
    """OpenAI's client, without proxies and retries."""
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        timeout=REQUEST_SECONDS,
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    )

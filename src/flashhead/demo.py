"""A template to copy and adapt: one model, several clients at once, text as it is generated.

`python -m flashhead.demo --model OUT --prompt "Once upon a time" --prompt "The sea"`
"""

import argparse
import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

WORKER = ThreadPoolExecutor(max_workers=1)  # two calls at once would only share the same cores


async def answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> AsyncIterator[str]:
    """Pieces of text as they are generated; closing this early, or cancelling, stops the model."""
    from transformers import AsyncTextIteratorStreamer

    gone = threading.Event()
    streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)

    def work() -> None:  # in the worker thread: the event loop never waits for a token
        stop = [lambda _ids, _scores, **_: gone.is_set()]  # asked after every token
        try:
            if not gone.is_set():  # a client may leave while it waits for its turn
                model.generate(
                    **inputs, max_new_tokens=tokens, streamer=streamer, stopping_criteria=stop
                )
        finally:
            streamer.end()  # after an error, too: the loop below must not wait for ever

    running = asyncio.get_running_loop().run_in_executor(WORKER, work)
    try:
        async for piece in streamer:
            yield piece
        await running  # raises what `generate` raised
    finally:
        gone.set()


async def client(name: str, pieces: AsyncIterator[str]) -> None:
    """Stands for a connection: replace `print` by what sends to yours."""
    async for piece in pieces:
        print(f"{name}: {piece!r}", flush=True)


async def main(args: argparse.Namespace) -> None:
    """Load once, then serve all prompts concurrently."""
    import flashhead

    model, tokenizer = flashhead.load(args.model), flashhead.load_tokenizer(args.model)
    streams = [answer(model, tokenizer, p, args.max_new_tokens) for p in args.prompt]
    await asyncio.gather(*(client(f"client {i}", s) for i, s in enumerate(streams, 1)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m flashhead.demo")
    parser.add_argument("--model", required=True, help="what flashhead convert wrote, or any model")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    try:
        asyncio.run(main(parser.parse_args()))
    except ValueError as error:  # no such model, an empty prompt: one line, not a traceback
        parser.exit(2, f"{parser.prog}: {error}\n")

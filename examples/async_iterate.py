"""Read in an event loop while the model writes in a thread, and stop it when that is enough."""

import asyncio

from streaming import IteratorStreamer
from streaming.models.loading import load_model


async def main() -> None:
    loaded = load_model()
    streamer = IteratorStreamer(loaded.tokenizer, skip_prompt=True, timeout=120)
    inputs = loaded.tokenizer("An increasing sequence: one,", return_tensors="pt")
    writing = asyncio.create_task(
        asyncio.to_thread(streamer.run, loaded.model.generate, **inputs, max_new_tokens=200, do_sample=False)
    )
    async for text in streamer:
        print(text, end="", flush=True)
        if "five" in text:
            streamer.cancel()
    await writing
    print(f" ({streamer.log.finish.reason})")


asyncio.run(main())

"""Send events over TCP, one JSON object a line: `nc -l 9000` in one terminal, this in another."""

import sys

from streaming import SocketStreamer
from streaming.models.loading import load_model

port = int(sys.argv[1]) if len(sys.argv) > 1 else 9000
loaded = load_model()
streamer = SocketStreamer(loaded.tokenizer, ("127.0.0.1", port))
inputs = loaded.tokenizer("An increasing sequence: one,", return_tensors="pt")
loaded.model.generate(**inputs, streamer=streamer, max_new_tokens=20, do_sample=False)
if streamer.dropped:
    print(f"Nobody got all of it: {streamer.dropped}")

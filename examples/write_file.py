"""Write a text to a file that `tail -f` can follow, and its events to a file that is there only when it is whole."""

import sys

from streaming import FileStreamer, TeeStreamer
from streaming.models.loading import load_model

folder = sys.argv[1] if len(sys.argv) > 1 else "."
loaded = load_model()
inputs = loaded.tokenizer("An increasing sequence: one,", return_tensors="pt")
streamer = TeeStreamer(
    FileStreamer(loaded.tokenizer, f"{folder}/text.txt"),
    FileStreamer(loaded.tokenizer, f"{folder}/events.jsonl", skip_prompt=True, format="jsonl", atomic=True),
)
loaded.model.generate(**inputs, streamer=streamer, max_new_tokens=20, do_sample=False)

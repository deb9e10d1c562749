"""Print a text as the model writes it: what `TextStreamer` does, character by character in every script."""

from streaming import ConsoleStreamer
from streaming.models.loading import load_model

loaded = load_model()
inputs = loaded.tokenizer("An increasing sequence: one,", return_tensors="pt")
loaded.model.generate(**inputs, streamer=ConsoleStreamer(loaded.tokenizer), max_new_tokens=20, do_sample=False)

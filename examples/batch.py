"""Stream several prompts at once, each row on its own: transformers' streamers take one."""

from threading import Thread

from streaming import IteratorStreamer
from streaming.models.loading import load_model

PROMPTS = ["An increasing sequence: one,", "The capital of France is", "Once upon a time"]

loaded = load_model()
tokenizer = loaded.tokenizer
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
streamer = IteratorStreamer(tokenizer, skip_special_tokens=True)
inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
options = dict(**inputs, max_new_tokens=20, do_sample=False)
thread = Thread(target=streamer.run, args=[loaded.model.generate], kwargs=options)
thread.start()
for row in range(len(PROMPTS)):
    print(f"{row}: {''.join(streamer.texts(row))}")
thread.join()

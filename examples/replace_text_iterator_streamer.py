"""Replace TextIteratorStreamer in an app of your own: change the import, and `generate` to `streamer.run`.

-   from transformers import TextIteratorStreamer
+   from streaming import IteratorStreamer
-   streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
-   thread = Thread(target=model.generate, kwargs=dict(**inputs, streamer=streamer, max_new_tokens=20))
+   streamer = IteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
+   thread = Thread(target=streamer.run, args=[model.generate], kwargs=dict(**inputs, max_new_tokens=20))

The loop stays as it is. New: what generate() raises reaches it, it can stop, and others can read along.
"""

from threading import Thread

from streaming import IteratorStreamer
from streaming.models.loading import load_model

loaded = load_model()
model, tokenizer = loaded.model, loaded.tokenizer
inputs = tokenizer("An increasing sequence: one,", return_tensors="pt")

streamer = IteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
thread = Thread(target=streamer.run, args=[model.generate], kwargs=dict(**inputs, max_new_tokens=20, do_sample=False))
thread.start()
try:
    for text in streamer:
        print(text, end="", flush=True)
finally:
    streamer.cancel()  # wherever the loop was left: the model stops within one token
    thread.join()
print()

"""Print a text, keep it, and count its tokens, all at once; one that fails does not stop the others."""

from streaming import CallbackStreamer, ConsoleStreamer, FileStreamer, TeeStreamer
from streaming.models.loading import load_model

loaded = load_model()
tokenizer = loaded.tokenizer
ids: list[int] = []


def count(event) -> None:
    if event.type == "token":
        ids.append(event.id)


streamer = TeeStreamer(
    ConsoleStreamer(tokenizer), FileStreamer(tokenizer, "text.txt"), CallbackStreamer(tokenizer, count)
)
inputs = tokenizer("An increasing sequence: one,", return_tensors="pt")
loaded.model.generate(**inputs, streamer=streamer, max_new_tokens=20, do_sample=False)
print(f"{len(ids)} tokens")

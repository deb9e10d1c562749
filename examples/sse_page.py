"""A page that streams, with FastAPI: `uvicorn examples.sse_page:app`, then open http://127.0.0.1:8000."""

from threading import Thread
from uuid import uuid4

from fastapi import FastAPI, Header
from fastapi.responses import HTMLResponse, StreamingResponse

from streaming import SSEStreamer
from streaming.models.loading import load_model

PAGE = """<!doctype html><meta charset="utf-8"><title>Brook</title>
<form id="form"><input id="words" value="An increasing sequence: one," size="50"> <button>Go on</button></form>
<pre id="text" style="white-space: pre-wrap"></pre>
<script>form.onsubmit = async submitted => {
  submitted.preventDefault(); text.textContent = ""
  const id = await (await fetch("start?" + new URLSearchParams({prompt: words.value}), {method: "POST"})).json()
  const source = new EventSource("stream/" + id)  // loses its connection? it comes back, with Last-Event-ID
  source.onmessage = message => {
    const event = JSON.parse(message.data)
    event.type == "finish" ? source.close() : text.textContent += event.text
  }
}</script>"""
app, loaded, streams = FastAPI(), load_model(), {}


@app.get("/", response_class=HTMLResponse)
def page() -> str:
    return PAGE


@app.post("/start")
def start(prompt: str) -> str:
    streams[name := uuid4().hex] = streamer = SSEStreamer(loaded.tokenizer, skip_special_tokens=True)
    options = dict(**loaded.tokenizer(prompt, return_tensors="pt"), max_new_tokens=50, do_sample=False)
    Thread(target=streamer.run, args=[loaded.model.generate], kwargs=options).start()
    return name


@app.get("/stream/{name}")
def stream(name: str, last_event_id: str | None = Header(None)) -> StreamingResponse:
    return StreamingResponse(streams[name].frames(last_event_id), media_type="text/event-stream")

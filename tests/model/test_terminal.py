"""The terminal with the default model, as a person or a script runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail

pytestmark = pytest.mark.model
ROOT = Path(__file__).parent.parent.parent
WAIT_S = 240
SEED = ["complete", "An increasing sequence: one,", "--max-new-tokens", "20", "--temperature", "0"]
SEED_TEXT = "An increasing sequence: one, two, three, four, five, six, seven, eight, nine, ten, eleven,"


def streaming(*arguments: str, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "streaming", *arguments], cwd=ROOT, capture_output=True, timeout=WAIT_S, **options
    )
    if done.returncode == 2 and b"default model" in done.stderr:
        skip_or_fail(f"the default model is not here: {done.stderr.decode()}")
    return done


def test_the_seed_prompt_prints_exactly_what_the_seed_says():
    done = streaming(*SEED)
    assert (done.returncode, done.stdout.decode()) == (0, SEED_TEXT + "\n")


def test_json_lines_join_to_the_same_text(tmp_path):
    done = streaming(*SEED, "--json", "--tee", str(tmp_path / "events.jsonl"))
    *tokens, finish = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert SEED[1] + "".join(token["text"] for token in tokens) == SEED_TEXT
    assert list(tokens[0]) == ["type", "index", "id", "text", "logprob", "top", "t_s"]
    assert (finish["reason"], finish["n_generated_tokens"]) == ("length", 20)
    assert (tmp_path / "events.jsonl").read_bytes() == done.stdout


def test_a_conversation_in_a_pipe():
    said = b"What is the capital of France?\n/stats\n/retry\n"
    done = streaming("chat", "--temperature", "0", "--max-new-tokens", "30", input=said)
    first, second = done.stdout.decode().strip().split("\n")
    assert first == second
    assert "Paris" in first
    assert b"tokens/s" in done.stderr

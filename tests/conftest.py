"""What tests share: a thread guard, and the small models of tests/tiny.py."""

import os
import threading
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import hypothesis
import pytest

# Machines are noisy: how long an example took says nothing about whether it is right.
hypothesis.settings.register_profile("brook", deadline=None)
hypothesis.settings.load_profile("brook")

REQUIRE_ALL = os.environ.get("BROOK_REQUIRE_ALL") == "1"


def pytest_collection_modifyitems(items):
    """Run tests/browser last: while its Playwright is open, no other event loop can run in this thread."""
    items.sort(key=lambda item: item.path.parent.name == "browser")


def skip_or_fail(reason: str) -> None:
    """Skip a test that lacks a part of its world; where everything is required, fail it instead."""
    if REQUIRE_ALL:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def no_thread_is_left(request):
    """Fail a test that leaves one of Brook's threads behind."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("brook"):
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"the test left the thread {thread.name} behind"


@pytest.fixture(scope="session")
def default_model():
    """The default model in fp32 on the CPU, fetched and converted if it is not yet on this machine."""
    from streaming.errors import ModelUnavailable
    from streaming.models.loading import load_model

    try:
        return load_model(device="cpu", dtype="float32", quantize="none")
    except ModelUnavailable as error:
        skip_or_fail(f"the default model is not here: {error}")

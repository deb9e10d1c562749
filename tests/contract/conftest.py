"""An engine that says what a message tells it to, and the page and the API in front of it; one of each for a file."""

import pytest

from tests.scripted import ScriptedEngine
from tests.serving import WAIT_S, serving


@pytest.fixture(scope="module")
def scripted():
    engine = ScriptedEngine()
    engine.wait_ready(WAIT_S)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(scripted):
    with serving(scripted) as url:
        yield url

"""Fixtures that several files here share."""

from tests.tiny_wheel import made as made
from tests.tiny_wheel import world as world

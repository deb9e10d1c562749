"""Models: fetched, converted and loaded."""

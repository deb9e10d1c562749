"""Conversations that last: what one is (tree.py), and where they are kept (store.py)."""

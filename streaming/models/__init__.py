"""Models and tokenizers: finding, fetching, converting and loading them."""

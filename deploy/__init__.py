"""Ways to run Brook on more than one machine."""

"""Ways to store a weight packed, one file for each."""

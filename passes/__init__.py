"""Sites, plans and rewrites of torch.fx graphs. Knows nothing of files, the Hub or who calls it."""

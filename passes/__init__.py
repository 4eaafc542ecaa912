"""Sites, plans and rewrites of torch.fx graphs. Knows nothing of files, the Hub or who calls it.

Never here: files, the Hub, a checkpoint's keys; who calls a pass, and for whom.
"""

"""Passes that make the same graph cheaper, and never another one."""

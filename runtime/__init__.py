"""Adapter parameters, activation, the adapted model and the PEFT checkpoint format."""

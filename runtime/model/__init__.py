"""The adapted model: an object of the user's class, and the methods users know from PEFT.

Never here: work of its own beyond handing it to the rooms below.
"""

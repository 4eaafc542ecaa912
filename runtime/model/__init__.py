"""The adapted model: an object of the user's class, and the methods users know from PEFT."""

"""What an adapted model is: an object of the user's class whose calls run graphs, its adapters, its base.

It knows nothing of what users do with it: adding, loading, merging, saving.

Never here: a verb of users'; a file.
"""

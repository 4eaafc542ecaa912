"""What is told to a person or a program about a job: tables, summaries, JSON, the console.

Never here: work: what it tells is handed to it.
"""

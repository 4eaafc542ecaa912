"""What is told to a person or a program about a job: tables, summaries, JSON, the console."""

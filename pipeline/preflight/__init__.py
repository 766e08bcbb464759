"""What a run would meet, found out on a sample of its units before it starts. Plain logic: nothing here knows Ray."""

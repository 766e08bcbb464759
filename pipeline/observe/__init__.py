"""What a run says of itself while it goes on: where its time goes, what it costs, what happened."""

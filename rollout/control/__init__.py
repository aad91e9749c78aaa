"""What a person may do, whichever door they come in by: the API and the console call these."""

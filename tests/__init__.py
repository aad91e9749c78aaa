"""What Sluice does, shown by running it."""

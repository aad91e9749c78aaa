"""The shadow: asks the other version what a client asked, and compares the two answers."""

"""The trainer on a tiny model, a real store and, where marked, a real engine."""

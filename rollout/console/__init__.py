"""The web console: server-rendered pages that need nothing from elsewhere."""

"""The control API on port 8001: FastAPI, one module for each resource."""

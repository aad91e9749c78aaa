"""Tests of the data plane and the shadow."""

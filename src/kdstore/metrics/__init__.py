"""Metrics: pure functions on arrays and strings, exact to the published definitions; no model, no file."""

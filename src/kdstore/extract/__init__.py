"""Extraction: run a teacher once over a source and write its features to a store."""

"""Distilling a student from a store of teacher features (or training it without a teacher)."""

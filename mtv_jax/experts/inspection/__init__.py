"""Inspection of label sets: sheet, page, statistics."""

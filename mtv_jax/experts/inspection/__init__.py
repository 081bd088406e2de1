"""Inspection of label sets before training: sheet, page, statistics."""

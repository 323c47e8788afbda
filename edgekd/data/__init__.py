"""Samples, their labels, and the views of them that teacher and student share."""

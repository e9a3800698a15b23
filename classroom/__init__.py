"""Exercises made from the source itself, and labs: python -m classroom."""

"""Reads finished runs into rows, fits them, and makes figures and a report."""

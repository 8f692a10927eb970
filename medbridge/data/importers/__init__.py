"""Readers of published data sets and common file formats: each gives items, and a skip for every row that is none."""

"""Judging what was trained: features of images, metrics on them, and reports."""

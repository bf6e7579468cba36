"""Audits beside each other: paired differences of the same images, at the same noise."""

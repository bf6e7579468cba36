"""The one engine behind every sweep and audit: from a plan to records on disk, and what they say."""

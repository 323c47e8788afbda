"""Teachers, and the cache of what they say."""

"""Files that are written whole or not at all, their digests, checkpoints of long work, and videos."""

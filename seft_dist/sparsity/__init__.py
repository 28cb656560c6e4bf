"""The arithmetic of masks: selection, schedules, hashes, bit masks; no ranks, no files."""

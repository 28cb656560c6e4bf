"""Files for other programs: plain, packed and delta exports, model cards, conversions, and the quickstart's inputs."""

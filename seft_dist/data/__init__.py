"""From the records of files and data sets to token sequences, and from those to the batches of every rank."""

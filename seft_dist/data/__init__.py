"""Records of users' files and of data sets, to token sequences and the batches of every rank."""

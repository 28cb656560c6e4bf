"""Studies: several methods on several seeds, chosen on validation data, measured on test data, with tables and
figures."""

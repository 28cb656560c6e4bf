"""Studies: methods on several seeds, chosen on validation data, measured on test data, in tables and figures."""

"""Studies: several methods on several seeds, chosen on validation data, measured on test data, told in tables and figures."""

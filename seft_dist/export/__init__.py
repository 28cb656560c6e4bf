"""Files that others read: plain, packed and delta exports, model cards, conversions, inputs of the quickstart."""

"""Whether two runs did the same: compared step by step, or started several times on several layouts."""

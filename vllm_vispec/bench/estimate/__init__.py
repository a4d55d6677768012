"""What speedup to expect, from sizes and rates: a roofline per pass. Its results are estimates."""

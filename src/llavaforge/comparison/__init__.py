"""`llavaforge compare`: several ways to train, each with several seeds, under one budget; one report."""

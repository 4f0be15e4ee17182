"""The page of `llavaforge demo`."""

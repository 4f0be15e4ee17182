"""`llavaforge data check`: what is wrong with the data."""

"""`llavaforge data preview`: samples as the model sees them."""

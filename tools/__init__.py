"""Scripts for those who work on llavaforge."""

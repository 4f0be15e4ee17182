"""Where image bytes are: folders, archives, columns."""

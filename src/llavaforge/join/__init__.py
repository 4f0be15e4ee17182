"""From two pre-trained parts to one LLaVA folder."""

"""Self-contained HTML pages: one style, one skeleton, charts as inline SVG. No script, no network."""

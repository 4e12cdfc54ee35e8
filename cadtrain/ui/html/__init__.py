"""Pages in one file: text, tables, charts as inline SVG, pictures as data; no scripts and nothing from a network."""
